"""Starts the ranks of a run on this machine, watches them, and ends all of them when one fails.

Ranks find each other through a store that this process keeps on a free port: several runs at once
do not collide. They see the variables that `torchrun` sets.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from unitransformer.launch.failures import (
    ERROR_FILE,
    RUN_ID,
    RankFailure,
    first_failure,
    read_failure,
    report_failure,
    unreported_failure,
)
from unitransformer.launch.process_tree import die_with_parent
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE, handle_signals

ADDRESS = "127.0.0.1"  # of the store
BACKLOG = 4096  # ranks that connect at once
GRACE_S = 4.0  # from the first failure until the other ranks are killed
PATIENCE_S = 15.0  # from Ctrl-C, or a second signal, until ranks that do not end are killed


@dataclass
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

    def failure(self) -> RankFailure | None:
        """Returns why the rank has failed; None if it has not, or not yet.

        A rank may report its failure and still wait for a checkpoint that it writes.
        """
        code = self.exit_code
        failure = read_failure(self.error_file, self.rank)
        if failure is None and code is not None and code not in (0, STOPPED_EXIT_CODE):
            return unreported_failure(self.rank, code)
        return failure


def launch(
    num_ranks: int, main: Callable[[], int], *, command: Sequence[str], fork: bool
) -> RankFailure | int:
    """Runs `main` in `num_ranks` ranks on this machine and waits for all.

    Args:
        main: what a rank does; returns its exit code.
        command: starts a rank that does the same, where forking is not safe.
        fork: whether forking is safe, as on a CPU; it saves the imports of every rank.

    Returns:
        The first failure of a rank, or an exit code: 0; `STOPPED_EXIT_CODE` if the ranks have
        saved and left because of a signal; or 128 plus the signal that ended them.
    """
    caught: list[int] = []
    with (
        tempfile.TemporaryDirectory(prefix="unitransformer-") as folder,
        socket.create_server((ADDRESS, 0), backlog=BACKLOG) as listener,
        handle_signals((signal.SIGINT, *STOP_SIGNALS), lambda number, _: caught.append(number)),
    ):
        port = listener.getsockname()[1]
        ranks = []
        for rank in range(num_ranks):
            error_file = Path(folder) / f"{rank}.failure"
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": ADDRESS,
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": RUN_ID,
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                ERROR_FILE: str(error_file),
            }
            process, sentinel = _fork(variables, main) if fork else _start(variables, command)
            ranks.append(_Rank(rank, process, sentinel, error_file))
        # After the forks, which must not inherit its threads; it lives as long as this function.
        store = TCPStore(
            ADDRESS,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        try:
            return _watch(ranks, caught)
        finally:
            _kill(ranks)
            del store


def _fork(variables: Mapping[str, str], main: Callable[[], int]) -> tuple[Any, int]:
    """Forks a rank; returns the process and a file descriptor that is readable once it ended."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_be_rank, args=(variables, main, os.getpid()))
    sys.stdout.flush()
    sys.stderr.flush()
    process.start()
    return process, process.sentinel


def _be_rank(variables: Mapping[str, str], main: Callable[[], int], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(parent)
    os.environ |= variables
    try:
        sys.exit(main())
    except Exception as error:
        report_failure(error)
        sys.exit(1)


def _start(variables: Mapping[str, str], command: Sequence[str]) -> tuple[Any, int]:
    parent = os.getpid()
    process = subprocess.Popen(
        command,
        env={**os.environ, **variables},
        preexec_fn=lambda: die_with_parent(parent),
    )
    return process, os.pidfd_open(process.pid)


def _watch(ranks: Sequence[_Rank], caught: Sequence[int]) -> RankFailure | int:
    """Waits until all ranks have ended, or for `GRACE_S` after the first failure.

    Forwards signals that this process receives meanwhile, and that `caught` then holds.
    """
    deadline = math.inf
    num_forwarded = 0
    while alive := [rank for rank in ranks if rank.exit_code is None]:
        wait([rank.sentinel for rank in alive], timeout=0.1)
        for number in caught[num_forwarded:]:
            num_forwarded += 1
            # After the first signal ranks may take as long as they need to save.
            if number == signal.SIGINT or num_forwarded > 1:
                deadline = min(deadline, time.monotonic() + PATIENCE_S)
            for rank in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, number)
        if any(rank.failure() is not None for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            break
    if {rank.exit_code for rank in ranks} == {STOPPED_EXIT_CODE}:
        return STOPPED_EXIT_CODE
    if caught:
        return 128 + caught[0]
    failures = [failure for rank in ranks if (failure := rank.failure()) is not None]
    return first_failure(failures) if failures else 0


def _kill(ranks: Sequence[_Rank]) -> None:
    """Kills the ranks that still run, and the processes that any rank left behind."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.process.pid, signal.SIGKILL)
        if rank.exit_code is None:
            rank.process.kill()  # it has not made its process group yet
    for rank in ranks:
        rank.process.wait() if isinstance(rank.process, subprocess.Popen) else rank.process.join()
