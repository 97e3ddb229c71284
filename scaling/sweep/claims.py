"""Claims on the cells of a sweep: locks that end with their process, and notes that name it.

Readers lock only the notes, so looking never blocks a claim.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

CLAIMS = "claims"
LOCK, NOTE = ".lock", ".runs"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that has claimed a cell."""

    host: str
    process: int
    since_s: float  # clock time


class Claim:
    """Keeps other processes from claiming a cell until it is released or this process ends."""

    def __init__(self, lock: FileLock, note: Path) -> None:
        self._lock, self._note = lock, note
        self._file = note.open("a+")
        fcntl.flock(self._file, fcntl.LOCK_EX)  # waits for readers
        holder = {"host": socket.gethostname(), "process": os.getpid(), "since_s": time.time()}
        self._file.truncate(0)
        self._file.write(json.dumps(holder))
        self._file.flush()

    def release(self) -> None:
        self._note.unlink(missing_ok=True)
        self._file.close()
        self._lock.release()


def claim(folder: Path, name: str) -> Claim | None:
    """Claims a cell in the folder of a sweep; returns None if another process has claimed it."""
    claims = folder / CLAIMS
    claims.mkdir(exist_ok=True)
    lock = FileLock(claims / f"{name}{LOCK}")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return Claim(lock, claims / f"{name}{NOTE}")


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
