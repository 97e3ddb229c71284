"""Claims on the cells of a sweep: locks that end with their process, and notes that name it.

Readers lock only the notes, so looking never blocks a claim.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TextIO

from filelock import FileLock, Timeout

from unitransformer.record.fields import NUMBER, Kinds, check_fields

CLAIMS = "claims"
LOCK, NOTE = ".lock", ".runs"
GATE, GATE_S = ".gate", 10.0  # a lock that is held while a cell is claimed; timeout
BEAT_S, TAKEOVER_S = 2.0, 10.0  # between signs of life; without one, an earlier start is dead
JOB_ID, RESTARTS = "SLURM_JOB_ID", "SLURM_RESTART_COUNT"  # variables of a batch job


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that has claimed a cell."""

    host: str
    process: int
    since_s: float  # clock time
    job: str | None = None  # SLURM job, which keeps its id when it is requeued
    restart: int = 0  # how often the job was requeued before


FIELDS: dict[str, Kinds] = {
    "host": str,
    "process": int,
    "since_s": NUMBER,
    "job": (str, NoneType),
    "restart": int,
}


def claim(folder: Path, name: str) -> contextlib.ExitStack | None:
    """Claims a cell until the result is closed or this process ends; None: another process has.

    A file server keeps the locks of a dead node for minutes, or for good. A later start of the same
    SLURM job takes such a claim over, if the claim shows no sign of life for `TAKEOVER_S`.
    """
    claims = folder / CLAIMS
    claims.mkdir(exist_ok=True)
    holder = Holder(
        host=socket.gethostname(),
        process=os.getpid(),
        since_s=time.time(),
        job=os.environ.get(JOB_ID),
        restart=int(os.environ.get(RESTARTS) or 0),
    )
    if (claimed := _claim(claims / name, holder)) is not None:
        return claimed
    if (seen := _sign_of_an_earlier_start(claims / f"{name}{NOTE}", holder)) is None:
        return None
    time.sleep(TAKEOVER_S)
    return _claim(claims / name, holder, dead=seen)


def _claim(
    stem: Path, holder: Holder, *, dead: tuple[int, int] | None = None
) -> contextlib.ExitStack | None:
    """Claims a cell, also if its claim is by an earlier start whose sign of life is still `dead`.

    Only one process at a time does so for a cell. Thus the note of a held cell is by its holder,
    and nobody takes the lock between a look at the note and the deletion of the lock.
    """
    lock, path = (stem.with_name(f"{stem.name}{suffix}") for suffix in (LOCK, NOTE))
    with contextlib.ExitStack() as claimed:
        try:
            with FileLock(stem.with_name(f"{stem.name}{GATE}"), timeout=GATE_S):
                if dead is not None and _sign_of_an_earlier_start(path, holder) == dead:
                    lock.unlink(missing_ok=True)  # the old lock does not hold a new file
                claimed.enter_context(FileLock(lock).acquire(blocking=False))
                path.unlink(missing_ok=True)
                note = claimed.enter_context(path.open("x"))
                claimed.callback(_delete_own, path, note)
                fcntl.flock(note, fcntl.LOCK_EX)  # waits for readers
                note.write(json.dumps(asdict(holder)))
                note.flush()
        except Timeout:
            return None
        if holder.job is not None:
            has_ended = threading.Event()
            beats = threading.Thread(target=_beat, args=(note, has_ended), daemon=True)
            beats.start()
            claimed.callback(beats.join)
            claimed.callback(has_ended.set)
        return claimed.pop_all()


def _delete_own(path: Path, note: TextIO) -> None:
    with contextlib.suppress(OSError):  # a later start that took this for dead has another file
        if os.path.samestat(path.stat(), os.fstat(note.fileno())):
            path.unlink()


def _beat(note: TextIO, has_ended: threading.Event) -> None:
    """Shows that the holder is alive, by the time of its note."""
    while not has_ended.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(note.fileno())


def _sign_of_an_earlier_start(path: Path, holder: Holder) -> tuple[int, int] | None:
    """Returns what changes as long as an earlier start of this job lives; None: another's note.

    SLURM starts a job again when it has ended it or declared its node down, which may be alive
    and out of SLURM's reach only.
    """
    # `open` asks a file server for the present time of the note, which `stat` does not.
    with contextlib.suppress(OSError, ValueError), path.open() as note:
        before, stat = _read(note), os.fstat(note.fileno())
        if holder.job == before.job is not None and before.restart < holder.restart:
            return stat.st_ino, stat.st_mtime_ns
    return None


def _read(note: TextIO) -> Holder:
    """Reads a note, also of a version with other fields; raises ValueError."""
    values = json.load(note)
    if not isinstance(values, dict):
        raise ValueError("not an object")
    known: dict[str, Any] = {"job": None, "restart": 0} | values  # older versions lack these
    check_fields(known, FIELDS, NOTE)
    return Holder(**{name: known[name] for name in FIELDS})


def find_holders(folder: Path) -> dict[str, Holder]:
    """Returns who has claimed which cell, by its name; notes of killed processes are ignored."""
    holders = {}
    for path in sorted((folder / CLAIMS).glob(f"*{NOTE}")):
        with contextlib.suppress(OSError, ValueError), path.open() as note:
            try:
                fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holders[path.name.removesuffix(NOTE)] = _read(note)
    return holders
