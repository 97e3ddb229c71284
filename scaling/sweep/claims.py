"""Who works on which cell of a sweep: a claim ends with its holder, a note tells what is claimed.

Whoever looks takes locks for a moment, but those of notes alone: nobody who wants to claim a cell
finds it taken by a glance.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

CLAIMS = "claims"
LOCK, NOTE = ".lock", ".runs"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who has claimed a cell."""

    host: str
    process: int
    since_s: float  # clock time


class Claim:
    """A cell that nobody else can claim until it is released, or this process has ended."""

    def __init__(self, lock: FileLock, note: Path) -> None:
        self._lock, self._note = lock, note
        self._file = note.open("a+")
        fcntl.flock(self._file, fcntl.LOCK_EX)  # somebody may be looking
        holder = {"host": socket.gethostname(), "process": os.getpid(), "since_s": time.time()}
        self._file.truncate(0)
        self._file.write(json.dumps(holder))
        self._file.flush()

    def release(self) -> None:
        self._note.unlink(missing_ok=True)
        self._file.close()
        self._lock.release()


def claim(folder: Path, name: str) -> Claim | None:
    """Claim a cell in the folder of a sweep; None if another has."""
    places = folder / CLAIMS
    places.mkdir(exist_ok=True)
    lock = FileLock(places / f"{name}{LOCK}")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return Claim(lock, places / f"{name}{NOTE}")


def find_holders(folder: Path) -> dict[str, Holder]:
    """Cells that are claimed now, by their name; notes of those who were killed tell nothing."""
    return dict(_find(folder))


def _find(folder: Path) -> Iterator[tuple[str, Holder]]:
    for path in sorted((folder / CLAIMS).glob(f"*{NOTE}")):
        with contextlib.suppress(OSError, ValueError), path.open() as note:
            try:
                fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield path.name.removesuffix(NOTE), Holder(**json.loads(note.read()))
