"""Compiled code that the cells of a sweep share.

A compiler writes its result in place, so that one that is killed leaves a truncated file under the
name that the next compiler would load. Each cell therefore compiles into its own folder, which
starts with links to all shared files. A cell that ends well shares the files that it has added.
"""

import os
import secrets
import shutil
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
FOLDER = "compile-cache"
TEMPORARY = (".lock", ".tmp")


def share(folder: Path, other: Path) -> None:
    """Links the compiled files of a folder into another one, which may have some of them."""
    other.mkdir(parents=True, exist_ok=True)
    for parent, _, names in os.walk(folder):
        for name in names:
            target = other / Path(parent, name).relative_to(folder)
            is_temporary = name.startswith(".") or name.endswith(TEMPORARY)
            if not is_temporary and not target.exists():
                _link(Path(parent, name), target)


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
