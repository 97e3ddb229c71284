"""Where things may be put. Whether a place can be written is asked before anything expensive."""

import os
import tempfile
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Of what can be made again: $UNITRANSFORMER_CACHE, else the user's folder for caches."""
    folder = os.environ.get("UNITRANSFORMER_CACHE")
    return Path(folder).expanduser() if folder else platformdirs.user_cache_path("unitransformer")


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
