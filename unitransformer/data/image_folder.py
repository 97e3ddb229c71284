"""Lists the images of a folder with their labels, and the split that its folders make.

Class folders hold images directly. They lie in the folder itself (`flowers/daisy/1.jpg`) or in its
split folders (`flowers/train/daisy/1.jpg`, `flowers/val/daisy/2.jpg`). Other layouts are refused,
because they have several meanings.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

IMAGE_NAME = re.compile(
    r".*\.(jpe?g|jfif|a?png|gif|webp|avif|bmp|tiff?|jp2|p[bgnp]m)", re.IGNORECASE | re.DOTALL
)
SPLIT_NAME = re.compile(r"(train)(?:ing)?|(val)(?:id(?:ation)?)?|(test)(?:ing)?", re.IGNORECASE)
# What operating systems and file servers leave behind, in lower case.
SYSTEM_NAMES = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found"}

ImageFile = tuple[str, int]  # path and label


class ImageFiles(NamedTuple):
    """The images of a folder by split, sorted by class and name."""

    class_names: tuple[str, ...]
    train: list[ImageFile]
    validation: list[ImageFile]  # empty if there is no validation split
    notes: list[str]  # how the layout was read, and what was not used


class _Folder(NamedTuple):
    """The contents of a folder that are not hidden, sorted by name."""

    path: Path
    images: list[str]  # paths
    folders: list["_Folder"]  # with images at some depth
    others: list[str]  # paths of files that are not images, and of folders without images


def list_images(root: Path) -> ImageFiles:
    """Lists the images of `root`.

    Raises:
        ValueError: a folder cannot be listed, or the layout has no meaning or several.
    """
    top = _scan(root, ())
    splits = _find_splits(top)
    parts = [splits[name] for name in ("train", "val") if name in splits] or [top]
    classes = [_list_classes(part) for part in parts]
    if names := sorted(classes[0].keys() ^ classes[-1].keys()):
        raise ValueError(
            f"data {root} has images of {_name_some(names)} in only one of {parts[0].path.name}/ "
            f"and {parts[1].path.name}/; give both the same class folders"
        )
    if len(classes[0]) == 1:
        raise ValueError(f"data {root} has one class, {_name_some([*classes[0]])}; give at least 2")
    notes = [f"split by {' and '.join(f'{part.path.name}/' for part in parts)}"] if splits else []
    if test := splits.get("test"):
        notes.append(f"{test.path.name}/ ignored")
    if others := [os.path.relpath(path, root) for path in _find_others(top, test)]:
        notes.append(f"{len(others):,} passed over ({_name_some(others)})")
    train, validation = (
        [(path, label) for label, paths in enumerate(part.values()) for path in paths]
        for part in (classes[0], classes[1] if len(classes) > 1 else {})
    )
    return ImageFiles(tuple(map(printable, classes[0])), train, validation, notes)


def printable(name: str) -> str:
    """Returns a file name, which may hold any bytes, as text that can be encoded."""
    return os.fsencode(name).decode(errors="replace")


def _scan(path: Path, above: tuple[tuple[int, int], ...]) -> _Folder:
    """Reads all below `path`; `above` identifies the folders around it, to which links may lead."""
    found = _Folder(path, [], [], [])
    try:
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        with os.scandir(path) as scan:
            entries = [] if identity in above else sorted(scan, key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
                continue
            folder = _scan(Path(entry.path), (*above, identity)) if entry.is_dir() else None
            if folder and (folder.images or folder.folders):
                found.folders.append(folder)
            elif IMAGE_NAME.fullmatch(entry.name) and entry.is_file():
                found.images.append(entry.path)
            else:
                found.others.append(entry.path)
    except OSError as error:
        raise ValueError(
            f"data {error.filename} cannot be listed ({error.strerror}); make it readable"
        ) from error
    return found


def _find_splits(top: _Folder) -> dict[str, _Folder]:
    """Returns the folders train, val and test; none if the folders of `top` are classes.

    Raises:
        ValueError: they lie beside class folders or images, or there are too few or too many.
    """
    matches = [(SPLIT_NAME.fullmatch(folder.path.name), folder) for folder in top.folders]
    found = [(str(match[match.lastindex or 0]).lower(), f) for match, f in matches if match]
    classes = [folder for match, folder in matches if not match]
    if [split for split, _ in found] == ["train"] and classes and not found[0][1].folders:
        return {}  # trains, beside cars
    splits = dict(found)
    names = " and ".join(f"{folder.path.name}/" for _, folder in found)
    beside = [folder.path.name for folder in classes] or list(map(os.path.basename, top.images))
    if found and beside:
        raise ValueError(
            f"data {top.path} holds {names} beside {_name_some(beside)}, so its classes are not "
            f"clear; move all images into train/CLASS/ and val/CLASS/, or rename {names} if a class"
        )
    if len(splits) < len(found):
        raise ValueError(f"data {top.path} holds {names}; keep one folder per split")
    if splits and "train" not in splits:
        raise ValueError(f"data {top.path} holds {names} without train/; add train/CLASS/")
    return splits


def _list_classes(parent: _Folder) -> dict[str, list[str]]:
    """Returns the images of the class folders of `parent`; refuses images anywhere else."""
    names = [folder.path.name for folder in parent.folders]
    if parent.images or not names:
        found = _name_some(list(map(os.path.basename, parent.images or parent.others)))
        raise ValueError(
            f"data {parent.path} must hold one folder of images per class, and it holds "
            f"{found or 'nothing'}; put each image into the folder of its class"
        )
    for folder in parent.folders:
        if folder.folders:
            fix = f"give --data {folder.path}, or move" if len(names) == 1 else "move"
            raise ValueError(
                f"data {parent.path} has images in folders of class folders, as in "
                f"{folder.path.name}/{folder.folders[0].path.name}/, so its classes are not clear; "
                f"{fix} the images of a class into one folder; name folders of a split train/, val/"
            )
    return {folder.path.name: folder.images for folder in parent.folders}


def _find_others(folder: _Folder, ignored: _Folder | None) -> list[str]:
    """Returns the paths without images below `folder`, outside of `ignored`."""
    inner = (_find_others(f, ignored) for f in folder.folders if f is not ignored)
    return [*folder.others, *(path for paths in inner for path in paths)]


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
