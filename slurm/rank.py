"""One task of `srun`: starts what follows as its child and tells how that ended.

A process that is killed can tell nothing itself; a signal that comes before it can listen would
end it unsaved and unexplained. Standard library alone: this may run in any container.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where a rank says why it failed
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
STOPPED = os.EX_TEMPFAIL


def main(command: Sequence[str]) -> int:
    """Run `command`, hand signals on, and leave a word on a bad end; returns the exit code."""
    rank = int(os.environ["SLURM_PROCID"])
    file = Path(os.environ["UNITRANSFORMER_ERRORS"]) / f"{rank}.failure"
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
    if code == STOPPED or (code < 0 and -code in received):
        # By a file: at any exit code but 0 srun would kill the ranks that are still at it.
        file.with_suffix(".stopped").touch()
        return 0
    if code != 0 and not file.exists():
        _tell(file, rank, code)
    return code if code >= 0 else 128 - code


def _tell(file: Path, rank: int, code: int) -> None:
    where = f"rank {rank} on {socket.gethostname()}"
    kind, told = "ExitCode", f"{where} ended with exit code {code} and said nothing"
    if code < 0:
        kind = signal.Signals(-code).name
        why = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        told = f"{where} was killed by {kind}{why}"
    # At no time: what others say of the lost connection comes after.
    failure = {"type": kind, "message": told, "lines": [], "at_s": 0.0, "is_bad_usage": code == 2}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"failure": failure}))
    partial.rename(file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
