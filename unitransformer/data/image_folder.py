"""Lists the images of a folder with their labels, and the split that its folders make.

Class folders hold images directly. They lie in the folder itself (`flowers/daisy/1.jpg`) or in its
split folders (`flowers/train/daisy/1.jpg`, `flowers/val/daisy/2.jpg`). Other layouts are refused,
because they have several meanings.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unitransformer.files import printable

IMAGE_NAME = re.compile(
    r".*\.(jpe?g|jfif|a?png|gif|webp|avif|bmp|tiff?|jp2|p[bgnp]m)", re.IGNORECASE | re.DOTALL
)
SPLIT_NAME = re.compile(r"(train)(?:ing)?|(val)(?:id(?:ation)?)?|(test)(?:ing)?", re.IGNORECASE)
# What operating systems and file servers leave behind, in lower case.
SYSTEM_NAMES = {
    *("__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found"),
    *("$recycle.bin", "#recycle", "system volume information"),
}

ImageFile = tuple[str, int]  # path and label
Parts = tuple[str, ...]  # names from the root to a folder


class ImageFiles(NamedTuple):
    """The images of a folder by split, sorted by class and name."""

    class_names: tuple[str, ...]
    train: list[ImageFile]
    validation: list[ImageFile]  # empty if there is no validation split
    notes: list[str]  # how the layout was read, and what was not used


def list_images(root: Path) -> ImageFiles:
    """Lists the images of `root`.

    Raises:
        ValueError: a folder cannot be listed, or the layout has no meaning or several.
    """
    found, others = _scan(root)
    passed_over = f"{len(others):,} passed over ({_name_some(others)})" if others else ""
    if not found:
        what = f": {passed_over}" if others else ""
        raise ValueError(f"data {root} holds no images{what}; give a folder of images per class")
    splits = _find_splits(root, list(found))
    classes: dict[str, dict[str, list[str]]] = {}
    for folder, images in found.items():
        classes.setdefault(splits.get(folder[0], "train"), {})[folder[-1]] = images
    train, validation = classes["train"], classes.get("val", {})
    names = [f"{name}/" for name, split in splits.items() if split != "test"]
    if different := sorted(train.keys() ^ validation.keys() if validation else ()):
        raise ValueError(
            f"data {root} has images of {_name_some(different)} in only one of "
            f"{' and '.join(names)}; give both the same class folders"
        )
    if len(train) == 1:
        raise ValueError(f"data {root} has one class, {_name_some([*train])}; give at least 2")
    notes = [f"split by {' and '.join(names)}"] if names else []
    notes += [f"{name}/ ignored" for name, split in splits.items() if split == "test"]
    notes += [passed_over] if others else []
    return ImageFiles(tuple(map(printable, train)), _label(train), _label(validation), notes)


def _scan(root: Path) -> tuple[dict[Parts, list[str]], list[str]]:
    """Returns the images below `root` by folder, and other files and folders without images."""

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"data {error.filename} cannot be listed ({error.strerror}); make it readable"
        ) from error

    def is_visible(name: str) -> bool:
        return not name.startswith(".") and name.lower() not in SYSTEM_NAMES

    found: dict[Parts, list[str]] = {}
    others: dict[Parts, list[str]] = {}
    for path, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        parts = Path(path).relative_to(root).parts
        others[parts] = []
        above = Path(path).parents[: len(parts)]
        if os.path.realpath(path) in map(os.path.realpath, above):
            subfolders.clear()  # a link that leads in a circle
            continue
        subfolders[:] = sorted(filter(is_visible, subfolders))
        for name in sorted(filter(is_visible, names)):
            if IMAGE_NAME.fullmatch(name):
                found.setdefault(parts, []).append(os.path.join(path, name))
            else:
                others[parts].append("/".join((*parts, name)))
    used = {(), *(parts[:depth] for parts in found for depth in range(len(parts) + 1))}
    files = [name for parts, names in others.items() if parts in used for name in names]
    unused = (parts for parts in others if parts not in used and parts[:-1] in used)
    return found, files + ["/".join(parts) for parts in unused]


def _find_splits(root: Path, folders: Sequence[Parts]) -> dict[str, str]:
    """Returns the split (train, val or test) of each split folder; none if folders are classes.

    Args:
        folders: those that hold images.

    Raises:
        ValueError: images lie elsewhere than in class folders, or the splits are unclear.
    """
    tops = sorted({folder[0] for folder in folders if folder})
    matches = {name: match for name in tops if (match := SPLIT_NAME.fullmatch(name))}
    splits = {name: str(match[match.lastindex or 0]).lower() for name, match in matches.items()}
    if list(splits.values()) == ["train"] and len(tops) > 1 and max(map(len, folders)) == 1:
        splits = {}  # a class of trains, beside others
    right: list[str] = []
    wrong: list[str] = []
    for folder in folders:
        is_ignored = splits.get(folder[0]) == "test" if folder else False
        is_class = len(folder) == (2 if splits else 1) and (folder[0] in splits or not splits)
        (right if is_ignored or is_class else wrong).append("/".join((*folder, "")) or "./")
    if wrong:
        images = _name_some(wrong) + (f" beside {_name_some(right)}" if right else "")
        fix = f"give --data {root / tops[0]}, or move" if len(tops) == 1 and not splits else "move"
        raise ValueError(
            f"data {root} must hold one folder of images per class, or such folders in train/ and "
            f"val/, and it holds images in {images}; {fix} or rename what does not fit"
        )
    counts = Counter(splits.values())
    if splits and (counts["train"] != 1 or max(counts.values()) > 1):
        names = " and ".join(f"{name}/" for name in splits)
        raise ValueError(f"data {root} holds {names}; give one train/ and at most one val/")
    return splits


def _label(classes: dict[str, list[str]]) -> list[ImageFile]:
    return [(path, label) for label, paths in enumerate(classes.values()) for path in paths]


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
