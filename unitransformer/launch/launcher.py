"""Starts the ranks of a run on this machine, watches them, and ends all of them when one fails.

Ranks find each other through a store that this process keeps, on a port that the system has
chosen: two runs at once do not collide. They see the variables that `torchrun` sets.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from unitransformer.launch.failures import (
    ERROR_FILE,
    Failure,
    first_failure,
    read_failure,
    report_failure,
    silent_failure,
)
from unitransformer.launch.process_tree import die_with_parent
from unitransformer.launch.signals import EXIT_CODE, SIGNALS, handling

ADDRESS = "127.0.0.1"  # where the ranks started here meet
RUN_ID = "unitransformer"  # of the ranks started here, in `TORCHELASTIC_RUN_ID`
GRACE_S = 4.0  # from the first failure until the others are killed
BACKLOG = 4096  # ranks that connect at once
PATIENCE_S = 15.0  # from Ctrl-C, or a second signal, until ranks that do not end are killed


@dataclass(kw_only=True)
class _Rank:
    rank: int
    process: Any  # multiprocessing's or subprocess's
    sentinel: int
    error_file: Path

    @property
    def exit_code(self) -> int | None:
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        code: int | None = self.process.exitcode
        return code


def is_watched() -> bool:
    """Whether this process is a rank that `launch` has started."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID


def launch(
    num_ranks: int, main: Callable[[], int], *, command: Sequence[str], fork: bool
) -> Failure | int:
    """Run `main` in `num_ranks` ranks on this machine and wait for all.

    Args:
        main: what a rank does; returns its exit code.
        command: starts a rank that does the same, for where forking is not safe.
        fork: whether it is: on a CPU, where it saves every rank its imports.

    Returns:
        The first failure of a rank; or an exit code: 0, that of ranks which have saved and left
        because a signal asked for it, or 128 and the number of the signal that ended them.
    """
    with (
        tempfile.TemporaryDirectory(prefix="unitransformer-") as place,
        socket.create_server((ADDRESS, 0), backlog=BACKLOG) as listener,
        _signals() as caught,
    ):
        port = listener.getsockname()[1]
        variables = [
            _variables(num_ranks, rank, port) | {ERROR_FILE: str(Path(place) / f"{rank}.failure")}
            for rank in range(num_ranks)
        ]
        start = _fork if fork else _start
        ranks = [start(own, main, command) for own in variables]
        # After the forks, which must not inherit its threads; it lives as long as this function.
        store = TCPStore(
            *(ADDRESS, port),
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        try:
            return _watch(ranks, caught)
        finally:
            _kill(ranks)
            del store


def _variables(world_size: int, rank: int, port: int) -> dict[str, str]:
    """What a rank finds in its environment."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": RUN_ID,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _fork(variables: Mapping[str, str], main: Callable[[], int], _: Sequence[str]) -> _Rank:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_be_rank, args=(variables, main, os.getpid()))
    sys.stdout.flush()
    sys.stderr.flush()
    process.start()
    return _Rank(
        rank=int(variables["RANK"]),
        process=process,
        sentinel=process.sentinel,
        error_file=Path(variables[ERROR_FILE]),
    )


def _be_rank(variables: Mapping[str, str], main: Callable[[], int], parent: int) -> None:
    """What a forked process does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(parent)
    os.environ |= variables
    try:
        code = main()
    except Exception as error:
        report_failure(error)
        code = 1
    sys.exit(code)


def _start(variables: Mapping[str, str], _: Callable[[], int], command: Sequence[str]) -> _Rank:
    parent = os.getpid()
    process = subprocess.Popen(
        command,
        env={**os.environ, **variables},
        preexec_fn=lambda: die_with_parent(parent),
    )
    return _Rank(
        rank=int(variables["RANK"]),
        process=process,
        sentinel=os.pidfd_open(process.pid),
        error_file=Path(variables[ERROR_FILE]),
    )


def _watch(ranks: list[_Rank], caught: list[int]) -> Failure | int:
    """Wait until all have ended, or for a while after the first that has not ended well."""
    deadline = math.inf
    num_forwarded = 0
    while alive := [rank for rank in ranks if rank.exit_code is None]:
        wait([rank.sentinel for rank in alive], timeout=0.1)
        for number in caught[num_forwarded:]:
            num_forwarded += 1
            # Saving takes its time: who cannot wait for it sends another signal, or kills.
            if number == signal.SIGINT or num_forwarded > 1:
                deadline = min(deadline, time.monotonic() + PATIENCE_S)
            for rank in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, number)
        if any(_failure(rank) is not None for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            break
    codes = {rank.exit_code for rank in ranks}
    if codes == {EXIT_CODE}:
        return EXIT_CODE
    failures = [failure for rank in ranks if (failure := _failure(rank)) is not None]
    if caught:
        return 128 + caught[0]
    return first_failure(failures) if failures else 0


def _failure(rank: _Rank) -> Failure | None:
    """Why a rank has failed; None for one that has not, or not yet.

    A rank that still waits for what it has begun to save may have written its failure already.
    """
    code = rank.exit_code
    if told_itself := read_failure(rank.error_file, rank.rank):
        return told_itself
    if code in (None, 0, EXIT_CODE):
        return None
    assert code is not None
    return silent_failure(rank.rank, code)


def _kill(ranks: list[_Rank]) -> None:
    """End what still runs, and whatever any rank has started and left behind."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.process.pid, signal.SIGKILL)
        if rank.exit_code is None:
            rank.process.kill()  # it has not made its group yet
    for rank in ranks:
        rank.process.wait() if isinstance(rank.process, subprocess.Popen) else rank.process.join()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to stop that come meanwhile, in place of what they would do."""
    caught: list[int] = []
    with handling((signal.SIGINT, *SIGNALS), lambda number, _: caught.append(number)):
        yield caught
