"""One task of `srun`: starts what follows as its child and tells how that ended.

A process that is killed can tell nothing itself; a signal that comes before it can listen would
end it unsaved and unexplained. The first task of each node also shows that the node lives, and
looks whether slurm.job still does.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from slurm.runtime.heartbeat import EACH_S, JOB, Pulse
from unitransformer.launch.failures import ERROR_FILE, silent_failure, write_failure
from unitransformer.launch.signals import EXIT_CODE, SIGNALS
from unitransformer.launch.variables import ERRORS, without_launcher

POLL_S = 0.2


def main(command: Sequence[str]) -> int:
    """Run `command`, hand signals on, and leave a word on a bad end; returns the exit code."""
    rank = int(os.environ["SLURM_PROCID"])
    errors = Path(os.environ[ERRORS])
    file = errors / f"{rank}.failure"
    received: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _: object) -> None:
        received.append(number)
        for started in child:
            started.send_signal(number)

    for each in SIGNALS:
        signal.signal(each, hand_on)
    watchman = Watchman(errors, os.environ)
    child.append(subprocess.Popen(command, env={**os.environ, ERROR_FILE: str(file)}))
    for number in received:  # it came while the child was made
        child[0].send_signal(number)
    if watchman.is_needed:
        watchman.start()
    code = child[0].wait()
    # One that was not listening yet had not begun: nothing is lost.
    if code == EXIT_CODE or (code < 0 and -code in received):
        # By a file: at any exit code but 0 srun would kill the ranks that are still at it.
        file.with_suffix(".stopped").touch()
        code = 0
    elif code != 0 and not file.exists():
        write_failure(silent_failure(rank, code, node=socket.gethostname()), file)
    if watchman.is_needed:
        watchman.leave(is_well=code == 0, received=received)
    return code if code >= 0 else 128 - code


class Watchman(threading.Thread):
    """Shows that this node lives, and has the job settled if the node of slurm.job does not."""

    def __init__(self, errors: Path, variables: Mapping[str, str]) -> None:
        super().__init__(daemon=True)
        several = int(variables["SLURM_JOB_NUM_NODES"]) > 1
        self.is_needed = several and variables["SLURM_LOCALID"] == "0"
        self._is_beside_job = variables["SLURM_NODEID"] == "0"
        own = variables["SLURMD_NODENAME"]
        self._pulse = Pulse(
            folder=errors, own=own, others=[] if self._is_beside_job else [own, JOB]
        )
        self._elected = errors / "deputy"
        self._deputies = threading.Lock()

    def run(self) -> None:
        while True:
            if JOB in self._pulse.beat():
                self._pulse.clear([JOB])
                with self._deputies:
                    self._stand_in()
            time.sleep(EACH_S)

    def leave(self, *, is_well: bool, received: Sequence[int]) -> None:
        """Return when nobody is needed here any more: a rank that has failed may have done so
        because the node of slurm.job is dead, and then there is nobody else to tell.

        Args:
            received: signals; another one ends the waiting.
        """
        seen, asked = self._pulse.read(JOB), len(received)
        is_alone = not is_well and not self._is_beside_job
        while is_alone and self._pulse.read(JOB) == seen and len(received) == asked:
            time.sleep(POLL_S)
        self._deputies.acquire()

    def _stand_in(self) -> None:
        with contextlib.suppress(OSError):  # another does
            self._elected.touch(exist_ok=False)
            command = [sys.executable, "-m", "slurm.runtime.failover"]
            subprocess.run(command, env=without_launcher(os.environ))
            self._elected.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
