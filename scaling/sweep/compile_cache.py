"""Compiled code that the cells of a sweep share.

A compiler writes its result in place, so that one that is killed leaves a truncated file under the
name that the next compiler would load. Each cell therefore compiles into its own folder, which
starts with links to all shared files. A cell that ends well shares the files that it has added.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
FOLDER = "compile-cache"
TEMPORARY = (".lock", ".tmp")


def link_shared(shared: Path, folder: Path) -> None:
    """Creates the folder of a cell with all shared files."""
    folder.mkdir(parents=True)
    for source in _files(shared):
        _link(source, folder / source.relative_to(shared))


def publish(folder: Path, shared: Path) -> None:
    """Shares the files that a cell has compiled."""
    for source in _files(folder):
        target = shared / source.relative_to(folder)
        if not target.exists():
            _link(source, target)


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            if not name.startswith(".") and not name.endswith(TEMPORARY):
                yield Path(parent, name)


def _link(source: Path, target: Path) -> None:
    """Links or copies a file atomically; an existing target stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        copy = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        shutil.copy2(source, copy)
        copy.replace(target)
