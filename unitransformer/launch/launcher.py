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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from unitransformer.launch.failures import (
    ERROR_FILE,
    RankFailure,
    first_failure,
    read_failure,
    report_failure,
    unreported_failure,
)
from unitransformer.launch.process_tree import die_with_parent
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE, handle_signals

ADDRESS = "127.0.0.1"  # of the store
RUN_ID = "unitransformer"  # value of `TORCHELASTIC_RUN_ID` in the ranks started here
BACKLOG = 4096  # ranks that connect at once
GRACE_S = 4.0  # from the first failure until the other ranks are killed
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

    def failure(self) -> RankFailure | None:
        """Returns why the rank has failed; None if it has not, or not yet.

        A rank may report its failure and still wait for a checkpoint that it writes.
        """
        code = self.exit_code
        failure = read_failure(self.error_file, self.rank)
        if failure is None and code not in (None, 0, STOPPED_EXIT_CODE):
            return unreported_failure(self.rank, code)
        return failure


def is_launched_rank() -> bool:
    """Whether `launch` has started this process."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID


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
    with (
        tempfile.TemporaryDirectory(prefix="unitransformer-") as folder,
        socket.create_server((ADDRESS, 0), backlog=BACKLOG) as listener,
        _catch_signals() as caught,
    ):
        port = listener.getsockname()[1]
        start = _fork if fork else _start
        ranks = [
            start(_variables(num_ranks, rank, port, folder), main, command)
            for rank in range(num_ranks)
        ]
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


def _variables(world_size: int, rank: int, port: int, folder: str) -> dict[str, str]:
    """Returns the environment variables of a rank."""
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
        ERROR_FILE: f"{folder}/{rank}.failure",
    }


def _fork(variables: Mapping[str, str], main: Callable[[], int], _: Sequence[str]) -> _Rank:
