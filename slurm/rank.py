"""One task of `srun`: starts what follows as its child and tells how that ended.

A process that is killed can tell nothing itself; a signal that comes before it can listen would
end it unsaved and unexplained.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from unitransformer.failures import ERROR_FILE, silent_failure, write_failure
from unitransformer.stop_signals import EXIT_CODE, SIGNALS

ERRORS = "UNITRANSFORMER_ERRORS"  # folder where ranks say why they failed


def main(command: Sequence[str]) -> int:
    """Run `command`, hand signals on, and leave a word on a bad end; returns the exit code."""
    rank = int(os.environ["SLURM_PROCID"])
    file = Path(os.environ[ERRORS]) / f"{rank}.failure"
    received: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _: object) -> None:
        received.append(number)
        for started in child:
            started.send_signal(number)

    for each in SIGNALS:
        signal.signal(each, hand_on)
    child.append(subprocess.Popen(command, env={**os.environ, ERROR_FILE: str(file)}))
    for number in received:  # it came while the child was made
        child[0].send_signal(number)
    code = child[0].wait()
    # One that was not listening yet had not begun: nothing is lost.
    if code == EXIT_CODE or (code < 0 and -code in received):
        # By a file: at any exit code but 0 srun would kill the ranks that are still at it.
        file.with_suffix(".stopped").touch()
        return 0
    if code != 0 and not file.exists():
        write_failure(silent_failure(rank, code, node=socket.gethostname()), file)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
