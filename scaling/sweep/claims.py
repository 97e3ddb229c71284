"""Claims on the cells of a sweep: locks that end with their process, and notes that name it.

Readers lock only the notes, so looking never blocks a claim.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

CLAIMS = "claims"
LOCK, NOTE = ".lock", ".runs"
JOB_ID, RESTARTS = "SLURM_JOB_ID", "SLURM_RESTART_COUNT"  # variables of a batch job


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that has claimed a cell."""

    host: str
    process: int
    since_s: float  # clock time
    job: str | None = None  # SLURM job, which keeps its id when it is requeued
    restart: int = 0  # how often the job was requeued before


def claim(folder: Path, name: str) -> contextlib.ExitStack | None:
    """Claims a cell until the result is closed or this process ends; None: another process has."""
    claims = folder / CLAIMS
    claims.mkdir(exist_ok=True)
    lock, path = claims / f"{name}{LOCK}", claims / f"{name}{NOTE}"
    holder = Holder(
        host=socket.gethostname(),
        process=os.getpid(),
        since_s=time.time(),
        job=os.environ.get(JOB_ID),
        restart=int(os.environ.get(RESTARTS) or 0),
    )
    if (claimed := _claim(lock, path, holder)) is not None:
        return claimed
    if not _is_from_an_earlier_start(path, holder):
        return None
    # A file server keeps the locks of a dead node for minutes, or for good: on these files, and not
    # on new ones of the same names.
    for locked in (path, lock):
        locked.unlink(missing_ok=True)
    return _claim(lock, path, holder)


def _claim(lock: Path, path: Path, holder: Holder) -> contextlib.ExitStack | None:
    with contextlib.ExitStack() as claimed:
        try:
            claimed.enter_context(FileLock(lock).acquire(blocking=False))
        except Timeout:
            return None
        note = claimed.enter_context(path.open("w"))
        claimed.callback(path.unlink, missing_ok=True)
        fcntl.flock(note, fcntl.LOCK_EX)  # waits for readers
        note.write(json.dumps(asdict(holder)))
        note.flush()
        return claimed.pop_all()


def _is_from_an_earlier_start(path: Path, holder: Holder) -> bool:
    """Whether a start of this SLURM job before the present one has claimed the cell.

    That start is over: SLURM starts a job again only after it has ended it, or declared its node
    down.
    """
    if holder.job is None:
        return False
    with contextlib.suppress(OSError, ValueError, TypeError):
        before = Holder(**json.loads(path.read_text()))
        return before.job == holder.job and before.restart < holder.restart
    return False


def find_holders(folder: Path) -> dict[str, Holder]:
    """Returns who has claimed which cell, by its name; notes of killed processes are ignored."""
    holders = {}
    for path in sorted((folder / CLAIMS).glob(f"*{NOTE}")):
        with contextlib.suppress(OSError, ValueError), path.open() as note:
            try:
                fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holders[path.name.removesuffix(NOTE)] = Holder(**json.loads(note.read()))
    return holders
