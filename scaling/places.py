"""Places that a person names: can they be written? Asked before anything expensive starts."""

import tempfile
from pathlib import Path


def check_writable(option: str, path: Path, *, is_folder: bool) -> None:
    """Raises ValueError for a path that is of the other kind or below something closed."""
    if path.exists() and path.is_dir() != is_folder:
        kind = "file" if is_folder else "folder"
        raise ValueError(f"{option} {path} is a {kind}; choose another with --{option}")
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    beyond = path.absolute().relative_to(parent).parts
    if len(beyond) > 1 and (parent / beyond[0]).exists():
        raise ValueError(f"{option} {path}: {parent / beyond[0]} is a file; choose another place")
    try:
        # Asking for permission is not enough: root may write everywhere, but not on /proc.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(
            f"{option} {path}: {parent} cannot be written ({error.strerror}); choose another place"
        ) from error
