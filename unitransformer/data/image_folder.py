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


def list_images(root: Path) -> ImageFiles:
    """Lists the images of `root`.

    Raises:
        ValueError: a folder cannot be listed, or the layout has no meaning or several.
    """
    others: list[str] = []
    top = _scan(root, (), others)
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
    if others:
        paths = [os.path.relpath(path, root) for path in others[:4]]
        notes.append(f"{len(others):,} passed over ({_name_some(paths)})")
    train, validation = (
        [(path, label) for label, paths in enumerate(part.values()) for path in paths]
        for part in (classes[0], classes[1] if len(classes) > 1 else {})
    )
    return ImageFiles(tuple(map(printable, classes[0])), train, validation, notes)


def printable(name: str) -> str:
    """Returns a file name, which may hold any bytes, as text that can be encoded."""
    return os.fsencode(name).decode(errors="replace")


def _scan(path: Path, above: tuple[tuple[int, int], ...], others: list[str]) -> _Folder:
    """Reads all below `path`.

    Args:
        above: identifies the folders around `path`, to which links may lead.
        others: receives the paths of files that are not images and of folders without images.
    """
    found = _Folder(path, [], [])
    try:
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        with os.scandir(path) as scan:
            entries = [] if identity in above else sorted(scan, key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
                continue
            num_others = len(others)
            if entry.is_dir():
                folder = _scan(Path(entry.path), (*above, identity), others)
                if folder.images or folder.folders:
                    found.folders.append(folder)
                else:
                    others[num_others:] = [entry.path]
            elif IMAGE_NAME.fullmatch(entry.name) and entry.is_file():
                found.images.append(entry.path)
            else:
                others.append(entry.path)
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
    if len(splits) < len(found) or (found and "train" not in splits):
        raise ValueError(f"data {top.path} holds {names}; give one train/ and at most one val/")
    return splits


def _list_classes(parent: _Folder) -> dict[str, list[str]]:
    """Returns the images of the class folders of `parent`; refuses images anywhere else."""
    names = [folder.path.name for folder in parent.folders]
    if parent.images or not names:
        found = _name_some([os.path.basename(path) for path in parent.images]) or "no images"
        raise ValueError(
            f"data {parent.path} must hold one folder of images per class, and it holds {found}; "
            "put each image into the folder of its class"
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


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
