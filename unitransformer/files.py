"""Where things may be put. Whether a place can be written is asked before anything expensive."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import platformdirs

CACHE_FOLDER = "UNITRANSFORMER_CACHE"  # environment variable


def cache_folder() -> Path:
    """Of what can be made again: $UNITRANSFORMER_CACHE, else the user's folder for caches."""
    folder = os.environ.get(CACHE_FOLDER)
    return Path(folder).expanduser() if folder else platformdirs.user_cache_path("unitransformer")


def why_not_writable(path: Path) -> tuple[Path, str] | None:
    """The nearest folder at or above `path` that is there, and why nothing can be written in it;
    None if it can."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    try:
        # Asking for permission is not enough: root may write everywhere, but not on /proc.
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return there, str(error.strerror)
    return None


def check_writable(option: str, path: Path, *, is_folder: bool) -> None:
    """Raises ValueError for a path that is of the other kind or below something closed."""
    if path.exists() and path.is_dir() != is_folder:
        kind = "file" if is_folder else "folder"
        raise ValueError(f"{option} {path} is a {kind}; choose another with --{option}")
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    beyond = path.absolute().relative_to(parent).parts
    if len(beyond) > 1 and (parent / beyond[0]).exists():
        raise ValueError(f"{option} {path}: {parent / beyond[0]} is a file; choose another place")
    if closed := why_not_writable(parent):
        there, why = closed
        raise ValueError(
            f"{option} {path}: {there} cannot be written ({why}); choose another place"
        )


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` whole, when the block ends, or not at all.

    It is written beside `path`, flushed to disk and renamed; the folder is made if need be.

    Raises:
        OSError: the folder cannot be written or is full; what was at `path` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` whole or not at all; raises OSError as `open_atomically` does."""
    with open_atomically(path) as file:
        file.write(content)
