"""Places that a person names to a study, refused before anything expensive starts."""

from pathlib import Path

from unitransformer.places import why_closed


def check_writable(option: str, path: Path, *, is_folder: bool) -> None:
    """Raises ValueError for a path that is of the other kind or below something closed."""
    if path.exists() and path.is_dir() != is_folder:
        kind = "file" if is_folder else "folder"
        raise ValueError(f"{option} {path} is a {kind}; choose another with --{option}")
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    beyond = path.absolute().relative_to(parent).parts
    if len(beyond) > 1 and (parent / beyond[0]).exists():
        raise ValueError(f"{option} {path}: {parent / beyond[0]} is a file; choose another place")
    if closed := why_closed(parent):
        there, why = closed
        raise ValueError(
            f"{option} {path}: {there} cannot be written ({why}); choose another place"
        )
