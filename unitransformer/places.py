"""Can a place be written? Asked before anything expensive starts."""

import tempfile
from pathlib import Path


def why_closed(path: Path) -> tuple[Path, str] | None:
    """The nearest folder at or above `path` that is there, and why nothing can be written in it;
    None if it can."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    try:
        # Asking for permission is not enough: root may write everywhere, but not on /proc.
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return there, str(error.strerror)
    return None
