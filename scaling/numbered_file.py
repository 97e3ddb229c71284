"""Writes files under a new number, also if several processes choose a number at once."""

import contextlib
import itertools
import os
import secrets
from pathlib import Path

from unitransformer.files import write_atomically


def write_numbered(content: bytes, folder: Path, stem: str) -> Path:
    """Writes `STEM-NUMBER.json` with the next free number; returns its path.

    The file appears complete or not at all, and never replaces another. Missing folders are
    created.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    temporary = folder / f".{stem}.{secrets.token_hex(4)}"
    write_atomically(temporary, content)
    try:
        numbers = (path.stem.rpartition("-")[2] for path in folder.glob(f"{stem}-*.json"))
        last = max((int(n) for n in numbers if n.isdecimal()), default=0)
        for number in itertools.count(last + 1):
            path = folder / f"{stem}-{number}.json"
            with contextlib.suppress(FileExistsError):  # another process was faster
                _publish(temporary, path)
                return path
    finally:
        temporary.unlink(missing_ok=True)
    raise AssertionError("numbers do not end")


def _publish(temporary: Path, path: Path) -> None:
    """Gives a complete file its name; raises FileExistsError if another file has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A file server that repeats a request finds its own link.
        if not path.samefile(temporary):
            raise
    except OSError:
        # This file system has no hard links: reserve the name, then put the content there.
        path.open("xb").close()
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
