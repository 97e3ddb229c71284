"""Writes files atomically, checks paths before expensive work, and finds the cache folder."""

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import platformdirs

CACHE_FOLDER = "UNITRANSFORMER_CACHE"  # environment variable


def expand_home(path: str) -> str:
    """Returns a path with `~` and `~user` expanded; raises ValueError for an unknown user.

    Not `Path.expanduser`, which expands `./~name` too, as a `Path` has no `./`.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        hint = "there is no such user, and a name that begins with ~ needs ./ in front"
        raise ValueError(f"'{path}' does not exist; check the path: {hint}")
    return expanded


def cache_folder() -> Path:
    """Returns $UNITRANSFORMER_CACHE, or else the user's cache folder."""
    return folder_of(CACHE_FOLDER) or platformdirs.user_cache_path("unitransformer")


def folder_of(variable: str) -> Path | None:
    """Returns the folder that an environment variable names; None if it is not set or empty."""
    if not (folder := os.environ.get(variable)):
        return None
    try:
        return Path(expand_home(folder))
    except ValueError as error:
        raise ValueError(f"{variable} {error}") from None


def why_not_writable(path: Path) -> tuple[Path, str] | None:
    """Returns the existing path at or above `path` and why it is not writable; None if it is."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    try:
        # Checking permissions is not enough: root has all of them, even in /proc.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        return existing, str(error.strerror)
    return None


def check_writable(option: str, path: Path, *, is_folder: bool) -> None:
    """Raises ValueError if `path` is of the other kind or cannot be written."""
    if path.exists() and path.is_dir() != is_folder:
        kind = "file" if is_folder else "folder"
        raise ValueError(f"{option} {path} is a {kind}; choose another with --{option}")
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    below = path.absolute().relative_to(parent).parts
    if len(below) > 1 and (parent / below[0]).exists():
        raise ValueError(f"{option} {path}: {parent / below[0]} is a file; choose another path")
    if problem := why_not_writable(parent):
        folder, why = problem
        raise ValueError(
            # /proc says ENOENT though it is there.
            f"{option} {path}: {folder} cannot be written "
            f"({why if why != os.strerror(errno.ENOENT) else 'it takes no new files'}); choose "
            "another path"
        )


def check_is_utf8(option: str, path: Path) -> None:
    """Raises ValueError for a folder of runs whose name is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{option} {path} is not UTF-8, which TensorBoard needs; choose another with "
            f"--{option}, or set LC_ALL=C.UTF-8"
        ) from None


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears at `path`, complete, when the block ends; or not at all.

    It is written next to `path`, flushed to disk and renamed. Missing folders are created.

    Raises:
        OSError: the folder cannot be written or is full; the old file at `path` stays.
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
    """Writes `content` to `path` as `open_atomically` does."""
    with open_atomically(path) as file:
        file.write(content)


def read_if_there(path: Path) -> str:
    """Returns the text of a file; empty if it does not exist or cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def printable(name: str) -> str:
    """Returns a file name, which may hold any bytes, as text for one line."""
    return "".join(c if c.isprintable() else "?" for c in name)
