"""Wraps one task of srun: starts a command as a child process and reports how it ended.

A killed process cannot report itself, and a signal before its handlers are installed would end it
unsaved. The first task of each node also sends the node's heartbeat.
"""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slurm.job_files import SIGNAL, STEP
from slurm.runtime.allocation import check_shared
from slurm.runtime.node_health import ENDED, INTERVAL_S, beat
from unitransformer.cli import fail
from unitransformer.files import write_atomically
from unitransformer.launch.failures import (
    BAD_USAGE,
    ERROR_FILE,
    RankFailure,
    unreported_failure,
    write_failure,
)
from unitransformer.launch.process_tree import count_oom_kills
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE
from unitransformer.launch.variables import ERRORS_FOLDER, SHARED_FILE

SIGNAL_S = 1.0  # from a signal to the child until it arrives here
UNSHARED = "UnsharedFolder"  # type of the failure of a node that does not see a shared file


def main(command: Sequence[str]) -> int:
    """Runs `command`, forwards signals to it, and reports a failure; returns the exit code."""
    rank = int(os.environ["SLURM_PROCID"])
    errors = Path(os.environ[ERRORS_FOLDER])
    failure = errors / f"{rank}.failure"
    received: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)
        with contextlib.suppress(OSError):  # its time says what came first, this or a failure
            (errors / f"{SIGNAL}{rank}").touch()

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    if os.environ["SLURM_LOCALID"] == "0" and (shared := os.environ.get(SHARED_FILE)):
        try:
            check_shared(Path(shared))
        except ValueError as error:
            return _report_unshared(error, rank, failure)
    if rank == 0:  # all ranks have the same
        with contextlib.suppress(OSError):
            write_atomically(errors / STEP, os.environ["SLURM_STEP_ID"].encode())
    heart: threading.Thread | None = None
    killed_before, has_ended = count_oom_kills(), threading.Event()
    child = subprocess.Popen(command, env={**os.environ, ERROR_FILE: str(failure)})
    children.append(child)
    for early in received:  # arrived while the child was started
        child.send_signal(early)
    if sends_heartbeat(os.environ):
        heart = threading.Thread(target=_beat_until, args=(has_ended, errors), daemon=True)
        heart.start()
    code = child.wait()
    if heart is not None:
        has_ended.set()
        heart.join(INTERVAL_S)  # which a file system may delay
        beat(errors, os.environ["SLURMD_NODENAME"], ENDED)
    if -code in STOP_SIGNALS:
        _wait_for(received)
    # A child that a signal killed had not installed its handlers, so that nothing is lost.
    if code == STOPPED_EXIT_CODE or (code < 0 and -code in received):
        # Reported by a file: srun kills the other ranks at any exit code except 0.
        failure.with_suffix(".stopped").touch()
        return 0
    if code != 0 and not failure.exists():
        report = unreported_failure(rank, code, node=socket.gethostname())
        if code == -signal.SIGKILL and count_oom_kills() > killed_before:
            report = replace(report, type="MemoryError")  # by the kernel of this node
        write_failure(report, failure)
    return code if code >= 0 else 128 - code


def _wait_for(received: Sequence[int]) -> None:
    """Waits for the signal that has killed the child: SLURM sends it to one process at a time."""
    deadline = time.monotonic() + SIGNAL_S
    while not received and time.monotonic() < deadline:
        time.sleep(0.05)


def _report_unshared(error: ValueError, rank: int, path: Path) -> int:
    failure = RankFailure(rank=rank, type=UNSHARED, message=str(error), lines=[], is_bad_usage=True)
    with contextlib.suppress(OSError):
        write_failure(failure, path)
    return fail(str(error), BAD_USAGE)


def _beat_until(has_ended: threading.Event, errors: Path) -> None:
    for number in itertools.count():
        beat(errors, os.environ["SLURMD_NODENAME"], str(number))
        if has_ended.wait(INTERVAL_S):
            return


def sends_heartbeat(variables: Mapping[str, str]) -> bool:
    """Returns whether this is the first task on its node, in a job of several nodes."""
    return int(variables["SLURM_JOB_NUM_NODES"]) > 1 and variables["SLURM_LOCALID"] == "0"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
