"""Wraps one task of srun: starts a command as a child process and reports how it ended.

A killed process cannot report itself, and a signal before its handlers are installed would end it
unsaved. The first task of each node also sends the node's heartbeat.
"""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from slurm.runtime.node_health import INTERVAL_S, beat
from unitransformer.launch.failures import ERROR_FILE, unreported_failure, write_failure
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE
from unitransformer.launch.variables import ERRORS_FOLDER


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

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    child = subprocess.Popen(command, env={**os.environ, ERROR_FILE: str(failure)})
    children.append(child)
    for early in received:  # arrived while the child was started
        child.send_signal(early)
    if sends_heartbeat(os.environ):
        threading.Thread(target=_beat_forever, args=(errors,), daemon=True).start()
    code = child.wait()
    # A child that a signal killed had not installed its handlers, so that nothing is lost.
    if code == STOPPED_EXIT_CODE or (code < 0 and -code in received):
        # Reported by a file: srun kills the other ranks at any exit code except 0.
        failure.with_suffix(".stopped").touch()
        return 0
    if code != 0 and not failure.exists():
        write_failure(unreported_failure(rank, code, node=socket.gethostname()), failure)
    return code if code >= 0 else 128 - code


def _beat_forever(errors: Path) -> None:
    for number in itertools.count():
        beat(errors, os.environ["SLURMD_NODENAME"], number)
        time.sleep(INTERVAL_S)


def sends_heartbeat(variables: Mapping[str, str]) -> bool:
    """Returns whether this is the first task on its node, in a job of several nodes."""
    return int(variables["SLURM_JOB_NUM_NODES"]) > 1 and variables["SLURM_LOCALID"] == "0"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
