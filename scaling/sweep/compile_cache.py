"""Compiled code that the cells of a sweep share: each reads what earlier ones have left, whole.

A compiler writes its result in place, and one that is killed leaves half of it under the name that
the next would load. So a cell compiles into a folder of its own, which begins with everything that
is shared; what it has added is shared once it has ended well.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
FOLDER = "compile-cache"
PASSING = (".lock", ".tmp")  # of those who write


def link_shared(shared: Path, own: Path) -> None:
    """Begin a cell's folder with all that is shared."""
    own.mkdir(parents=True)
    for source in _files(shared):
        _link(source, own / source.relative_to(shared))


def publish(own: Path, shared: Path) -> None:
    """Share what a cell that has ended well has compiled."""
    for source in _files(own):
        target = shared / source.relative_to(own)
        if not target.exists():
            _link(source, target)


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        for name in names:
            if not name.startswith(".") and not name.endswith(PASSING):
                yield Path(place, name)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, whole or not at all; whoever was first is right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # a disk without links: a copy
        whole = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        shutil.copy2(source, whole)
        whole.replace(target)
