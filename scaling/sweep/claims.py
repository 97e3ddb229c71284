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


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that has claimed a cell."""

    host: str
    process: int
    since_s: float  # clock time


def claim(folder: Path, name: str) -> contextlib.ExitStack | None:
    """Claims a cell until the result is closed or this process ends; None: another process has."""
    claims = folder / CLAIMS
    claims.mkdir(exist_ok=True)
    claimed, path = contextlib.ExitStack(), claims / f"{name}{NOTE}"
    try:
        claimed.enter_context(FileLock(claims / f"{name}{LOCK}").acquire(blocking=False))
    except Timeout:
        return None
    note = claimed.enter_context(path.open("w"))
    claimed.callback(path.unlink, missing_ok=True)
    fcntl.flock(note, fcntl.LOCK_EX)  # waits for readers
    holder = Holder(host=socket.gethostname(), process=os.getpid(), since_s=time.time())
    note.write(json.dumps(asdict(holder)))
    note.flush()
    return claimed


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
