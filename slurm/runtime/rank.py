"""One task of `srun`: starts what follows as its child and tells how that ended.

A process that is killed can tell nothing itself; a signal that comes before it can listen would
end it unsaved and unexplained. The first task of each node also sends the node's heartbeat.
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

from slurm.runtime.heartbeat import EACH_S, beat
from unitransformer.launch.failures import ERROR_FILE, unreported_failure, write_failure
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE
from unitransformer.launch.variables import ERRORS_FOLDER


def main(command: Sequence[str]) -> int:
    """Run `command`, hand signals on, and leave a word on a bad end; returns the exit code."""
    rank = int(os.environ["SLURM_PROCID"])
    errors = Path(os.environ[ERRORS_FOLDER])
    file = errors / f"{rank}.failure"
    received: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _: object) -> None:
        received.append(number)
        for started in child:
            started.send_signal(number)

    for each in STOP_SIGNALS:
        signal.signal(each, hand_on)
    child.append(subprocess.Popen(command, env={**os.environ, ERROR_FILE: str(file)}))
    for number in received:  # it came while the child was made
        child[0].send_signal(number)
    if sends_heartbeat(os.environ):
        threading.Thread(target=_beat_on, args=(errors,), daemon=True).start()
    code = child[0].wait()
    # One that was not listening yet had not begun: nothing is lost.
    if code == STOPPED_EXIT_CODE or (code < 0 and -code in received):
        # By a file: at any exit code but 0 srun would kill the ranks that are still at it.
        file.with_suffix(".stopped").touch()
        code = 0
    elif code != 0 and not file.exists():
        write_failure(unreported_failure(rank, code, node=socket.gethostname()), file)
    return code if code >= 0 else 128 - code


def _beat_on(errors: Path) -> None:
    for number in itertools.count():
        beat(errors, os.environ["SLURMD_NODENAME"], number)
        time.sleep(EACH_S)


def sends_heartbeat(variables: Mapping[str, str]) -> bool:
    """Whether this task shows that its node lives: the first task of each of several nodes."""
    return int(variables["SLURM_JOB_NUM_NODES"]) > 1 and variables["SLURM_LOCALID"] == "0"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
