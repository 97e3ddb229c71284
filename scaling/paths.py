"""Says why a path leads to nothing."""

import errno
import os
from pathlib import Path


def why_missing(path: Path) -> str:
    """Returns what is wrong with a path for which `exists` is false, to follow its name."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a symbolic link that leads back to itself"
        if path.is_symlink():
            return f"is a symbolic link to {os.readlink(path)}, which does not exist"
    return "does not exist"
