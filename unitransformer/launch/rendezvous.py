"""What the processes of a run tell one another beside their process group: where its folder is,
before there is a group, which rank failed first, when it is broken, and that all have ended.

All through the store that they find each other by, at MASTER_ADDR and MASTER_PORT.
"""

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict

from torch._C._distributed_c10d import TCPStore

from unitransformer.launch.failures import Failure

WAIT = datetime.timedelta(minutes=10)  # for other nodes to be started
ANSWER = datetime.timedelta(seconds=5)  # of a store that is there
LOOK_S = 0.5  # between two looks at what other nodes say
LAST_WORDS = datetime.timedelta(
    seconds=2
)  # that a node which has failed waits for what others know
LINGER = datetime.timedelta(seconds=10)  # that a node which is refused or done waits for others
BACKLOG = 4096  # launchers and ranks that call at once
FOLDER, FAILED = "unitransformer/folder", "unitransformer/failed"
HEARD, ENDED = "unitransformer/heard", "unitransformer/ended"
REFUSED = ""  # in place of a folder


def agree_on_folder(choose: Callable[[], str]) -> str:
    """The folder that the first rank chooses, on every rank of a foreign launcher.

    Where the launcher keeps no store (srun), the first rank does, for the process group as well.

    Raises:
        RuntimeError: the first rank does not answer.
    """
    is_first = os.environ["RANK"] == "0"
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_first and not has_store,
        wait_for_workers=False,
        timeout=WAIT,
    )
    _kept.append(store)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    key = f"{FOLDER}/{os.environ.setdefault('TORCHELASTIC_RESTART_COUNT', '0')}"
    if is_first:
        store.set(key, choose())
    return store.get(key).decode()


_kept: list[TCPStore] = []  # as long as this process lives: others find each other by it


class Meeting:
    """The launchers of all nodes of a run; on one node, that launcher alone.

    Raises:
        ValueError: several nodes and no word where the first is, or its port is taken.
    """

    def __init__(self, num_nodes: int = 1) -> None:
        check_meeting_point(num_nodes)
        self.node = int(os.environ.get("NODE_RANK", 0)) if num_nodes > 1 else 0
        self.num_nodes = num_nodes
        self._store: TCPStore | None = None
        self._listener: socket.socket | None = None
        self._looked_s = 0.0
        self._has_failed = False  # elsewhere, as far as it was told
        self._has_first_ended = False
        self._is_lost = False
        self._has_shared = False
        self.address = ("127.0.0.1", 0)
        if self.num_nodes > 1:
            self.address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if self.node == 0:
            self._listener = _listen(self.address, num_nodes)
            self.address = (self.address[0], self._listener.getsockname()[1])

    def hear(self) -> str:
        """On all nodes but the first: what that one has told.

        Raises:
            ValueError: it has not been started, has ended, or was refused.
        """
        self._call(WAIT)
        assert self._store is not None
        try:
            told = self._store.get(FOLDER).decode()
            self._store.set_timeout(ANSWER)
            self._store.set(f"{HEARD}/{self.node}", "")
            if told == REFUSED:
                self._has_shared = True
                raise ValueError(json.loads(self._store.get(f"{FAILED}/0"))["message"])
        except RuntimeError as error:
            raise self._silence() from error
        return told

    def _call(self, patience: datetime.timedelta) -> None:
        """Find the first node's store, which may not have been opened yet."""
        until_s = time.monotonic() + patience.total_seconds()
        while self._store is None:
            if time.monotonic() > until_s:
                raise self._silence()
            with contextlib.suppress(OSError, RuntimeError):
                # Torch's own way to wait for a listener cannot be interrupted.
                socket.create_connection(self.address, timeout=LOOK_S).close()
                self._store = TCPStore(*self.address, is_master=False, timeout=patience)
                return
            time.sleep(LOOK_S)

    def _silence(self) -> ValueError:
        return ValueError(
            f"MASTER_ADDR {self.address[0]}: the first node does not answer at port "
            f"{self.address[1]}; start it first, and look there for an error"
        )

    def open(self, told: str) -> None:
        """Open the store on the first node, for ranks and launchers; they are forked before."""
        if self._listener is None or self._store is not None:
            return
        self._store = TCPStore(
            *self.address,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=self._listener.detach(),
        )
        self._store.set(FOLDER, told)

    def refuse(self, error: Exception) -> None:
        """Tell the other nodes that this one does not begin: their ranks would wait for its own.

        They may come a little later.
        """
        if self.num_nodes == 1:
            return
        with contextlib.suppress(RuntimeError, ValueError):  # nobody is there any more
            self.open(REFUSED)
            self._call(LINGER)
            assert self._store is not None
            if not self._has_shared:
                told = f"node {self.node} is refused: {error}"
                failure = Failure(
                    rank=0,
                    type="Refusal",
                    message=told,
                    lines=[],
                    is_bad_usage=True,
                    at_s=time.time(),
                )
                self._store.set(f"{FAILED}/{self.node}", json.dumps(asdict(failure)))
                self._store.set(FAILED, "")
            self._store.set(f"{HEARD}/{self.node}", "")
            if self.node == 0:
                self._wait_for([f"{HEARD}/{node}" for node in self._others], LINGER)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._store = None

    @property
    def _others(self) -> list[int]:
        return [node for node in range(self.num_nodes) if node != self.node]

    def _wait_for(self, names: list[str], patience: datetime.timedelta) -> None:
        """Until all of them are told, or for a while."""
        assert self._store is not None
        until_s = time.monotonic() + patience.total_seconds()
        while time.monotonic() < until_s and not self._store.check(names):
            time.sleep(0.05)

    def has_failed(self) -> bool:
        """Whether a rank of another node has failed, or the first node is gone before its end."""
        is_due = time.monotonic() > self._looked_s
        if is_due and not (self._has_failed or self._is_lost or self._has_first_ended):
            self._looked_s = time.monotonic() + LOOK_S
            self._look()
        return self._has_failed or self._is_lost

    def _look(self) -> None:
        if self.num_nodes == 1 or self._store is None:
            return
        try:
            self._has_failed = self._store.check([FAILED])
            # From then on its store may go, and whoever still runs has only to end.
            self._has_first_ended = self.node > 0 and self._store.check([f"{ENDED}/0"])
        except RuntimeError:
            self._is_lost = True

    def say_failed(self) -> None:
        """Let the others know at once: their ranks may wait for what never comes."""
        if self.num_nodes > 1 and self._store is not None and not self._has_failed:
            with contextlib.suppress(RuntimeError):
                self._store.set(FAILED, "")

    def say_ended(self) -> bool:
        """All ranks here have ended well; returns whether nobody has said that others have not.

        The store of the first node outlasts the ranks and launchers of the others, if these end
        within a while.
        """
        if self.num_nodes == 1 or self._store is None:
            return True
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{ENDED}/{self.node}", "")
            if self.node == 0:
                self._wait_for([f"{ENDED}/{node}" for node in self._others], LINGER)
            self._has_failed = self._store.check([FAILED])
        return not self._has_failed

    def share(self, failure: Failure | None) -> list[Failure]:
        """What other nodes know of why it failed, with this one's."""
        found = [] if failure is None else [failure]
        if self.num_nodes == 1 or self._store is None:
            return found
        self._has_shared = True
        told = json.dumps(None if failure is None else asdict(failure))
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{FAILED}/{self.node}", told)
            self._store.set(f"{ENDED}/{self.node}", "")
            others = [f"{FAILED}/{node}" for node in self._others]
            self._wait_for(others, LAST_WORDS)
            for name in others:
                if self._store.check([name]) and (said := json.loads(self._store.get(name))):
                    found.append(Failure(**said))
        return found


def check_meeting_point(num_nodes: int) -> None:
    """Raises ValueError where several nodes are not told where they meet."""
    wanted = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if num_nodes > 1 else ()
    missing = [name for name in wanted if name not in os.environ]
    if missing:
        raise ValueError(
            f"num-nodes is {num_nodes} and {_listed(missing)} not set: start the "
            "command on every node with MASTER_ADDR, MASTER_PORT and NODE_RANK, or with "
            "torchrun or srun"
        )


def _listed(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last} are" if most else f"{last} is"


def _listen(address: tuple[str, int], num_nodes: int) -> socket.socket:
    host, port = address
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("0.0.0.0" if num_nodes > 1 else host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"MASTER_PORT {port} cannot be used ({error.strerror})") from error
    listener.listen(BACKLOG)
    return listener
