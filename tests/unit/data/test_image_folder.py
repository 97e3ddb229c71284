"""Which folders are classes, which are splits, and which layouts are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from recipes import vit
from tests.builders.images import write_class_folders
from unitransformer.config import DataConfig, RunConfig
from unitransformer.data.image_folder import list_images
from unitransformer.data.images import FolderImages
from unitransformer.data.sources import DataSource, load_source

TINY = {"width": 16, "num_layers": 1, "num_heads": 2, "feedforward_width": 32}


def load(root: Path, num_classes: int = 9) -> DataSource:
    model = replace(vit.PRESET.model_config("reference", **TINY), num_classes=num_classes)
    data = DataConfig(source=str(root))
    return load_source(RunConfig(recipe="vit", size="reference", model=model, data=data))


def names_of(images: object, root: Path) -> list[str]:
    assert isinstance(images, FolderImages)
    return sorted(str(Path(path).relative_to(root)) for path, _ in images.files)


def images_below(*folders: Path) -> list[str]:
    root = folders[0].parent
    return sorted(str(path.relative_to(root)) for f in folders for path in f.rglob("*.png"))


def test_a_folder_has_one_class_per_subfolder_and_holds_out_a_tenth(tmp_path: Path) -> None:
    source = load(write_class_folders(tmp_path / "photos", "dog", "cat", count=10))
    assert source.class_names == ("cat", "dog")
    assert (len(source.train), len(source.validation)) == (18, 2)
    assert source.description == "photos, 20 images of 2 classes, 2 held out for validation"


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("training", "validation", "testing"),
        ("Train", "VALID", "Test"),
    ],
)
def test_split_folders_are_used_as_they_are(
    train: str, val: str, test: str, tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    for split, count in ((train, 5), (val, 2), (test, 3)):
        write_class_folders(root / split, "cat", "dog", count=count)
    source = load(root)
    assert source.class_names == ("cat", "dog")
    assert names_of(source.train, root) == images_below(root / train)
    assert names_of(source.validation, root) == images_below(root / val)
    assert source.description == (
        "photos, 14 images of 2 classes, 4 for validation, "
        f"split by {train}/ and {val}/, {test}/ ignored"
    )


def test_a_part_is_held_out_where_there_is_no_validation_folder(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write_class_folders(root / "train", "cat", "dog", count=10)
    (root / "test").mkdir()
    (root / "test" / "1.png").write_bytes(b"without a class")
    source = load(root)
    assert (len(source.train), len(source.validation)) == (18, 2)
    assert not {*names_of(source.train, root)} & {*names_of(source.validation, root)}
    assert source.description == (
        "photos, 20 images of 2 classes, 2 held out for validation, split by train/, test/ ignored"
    )


def test_the_digest_follows_content_class_and_split(tmp_path: Path) -> None:
    flat = write_class_folders(tmp_path / "flat", "cat", "dog")
    renamed = write_class_folders(tmp_path / "renamed", "cat", "fox")
    split = tmp_path / "split"
    write_class_folders(split / "train", "cat", "dog")
    held_out = load(split)
    write_class_folders(split / "val", "cat", "dog")
    copies = [load(write_class_folders(tmp_path / "copy", "cat", "dog")), load(flat), held_out]
    assert len({source.sha256 for source in copies}) == 1
    assert len({source.sha256 for source in (*copies, load(split), load(renamed))}) == 3
    image = flat / "cat" / "0.png"
    image.write_bytes((flat / "dog" / "1.png").read_bytes())
    assert load(flat).sha256 != held_out.sha256


def test_hidden_and_empty_folders_are_no_classes(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "photos", "cat", "dog")
    hidden = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git")
    write_class_folders(root, *hidden)
    write_class_folders(root / "cat", *hidden)
    for name in (".DS_Store", "Thumbs.db", "._1.png", "cat/._1.png", "cat/Thumbs.db"):
        (root / name).write_bytes(b"\0")
    assert load(root).description == ("photos, 8 images of 2 classes, 1 held out for validation")
    (root / "labels").mkdir()
    (root / "labels" / "1.txt").write_text("cat")
    (root / "README.txt").touch()
    (root / "cat" / "1.heic").touch()
    (root / "dog" / "masks").mkdir()
    source = load(root)
    assert source.class_names == ("cat", "dog")
    assert source.description == (
        "photos, 8 images of 2 classes, 1 held out for validation, "
        "4 passed over (README.txt, cat/1.heic, dog/masks, ...)"
    )


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "photos", "cat")
    (root / "dog").symlink_to(write_class_folders(tmp_path / "elsewhere", "dog") / "dog")
    (root / "cat" / "up").symlink_to(root)
    files = list_images(root)
    assert files.class_names == ("cat", "dog")
    assert len(files.train) == 8
    assert files.notes == ["1 passed over (cat/up)"]
    (root / "latest").symlink_to(".")
    assert list_images(root / "latest").class_names == ("cat", "dog")


def test_train_is_a_class_among_others_if_it_holds_images(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "vehicles", "bus", "train")
    assert list_images(root).class_names == ("bus", "train")


def test_a_class_name_of_any_bytes_can_be_printed(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "photos", "caf\udce9", "dog")
    assert list_images(root).class_names == ("caf?", "dog")


BOTH = ("cat", "dog")
FIX = "move or rename what does not fit"


@pytest.mark.parametrize(
    ("folders", "images", "problem", "fix"),
    [
        # splits beside something else
        ({"train": BOTH, "": BOTH}, [], "images in cat/, dog/ beside train/cat/, train/dog/", ""),
        ({"": (*BOTH, "test")}, [], "images in cat/, dog/ beside test/", ""),
        ({"train": BOTH, "val": BOTH}, ["1.png"], r"images in \./ beside train/cat/", ""),
        ({"": ("train", "val")}, [], "images in train/, val/", ""),
        ({"train": BOTH, "": ("val",)}, [], "images in val/ beside train/cat/", ""),
        ({"train": BOTH, "Training": BOTH}, [], "Training/ and train/", "give one train/"),
        ({"val": BOTH, "test": BOTH}, [], "test/ and val/", "give one train/"),
        # classes that do not fit together
        ({"train": BOTH, "val": ("cat", "fox")}, [], "dog, fox in only one of train/ and", "both"),
        ({"train": BOTH, "val": ("cat",)}, [], "dog in only one of train/ and val/", "both"),
        ({"train": (*BOTH, "owl"), "val": BOTH}, [], "owl in only one of", "same class folders"),
        # images where no class is
        ({"": BOTH}, ["1.png"], r"images in \./ beside cat/, dog/", ""),
        ({}, ["1.png", "2.png"], r"it holds images in \./", ""),
        (
            {},
            ["1.heic"],
            r"holds no images: 1 passed over \(1.heic\)",
            "give a folder of images per class",
        ),
        ({}, [], "holds no images", "give a folder of images per class"),
        ({"train": BOTH}, ["train/1.png"], "images in train/ beside train/cat/", ""),
        ({"": ("cat",)}, [], "photos has one class, cat", "give at least 2"),
        # classes in classes
        (
            {"pets": BOTH, "wild": ("fox", "owl")},
            [],
            "images in pets/cat/, pets/dog/, wild/fox/",
            "",
        ),
        ({"download": BOTH}, [], "images in download/cat/", "give --data .*photos/download, or "),
        ({"": BOTH, "cat": ("kitten",)}, [], "images in cat/kitten/ beside cat/, dog/", ""),
        ({"download/train": BOTH}, [], "in download/train/cat/", "give --data .*photos/download"),
        ({"train/pets": BOTH, "val": BOTH}, [], "images in train/pets/cat/.* beside val/cat/", ""),
        ({"my_train": BOTH, "my_val": BOTH}, [], "images in my_train/cat/", ""),
    ],
)
def test_a_layout_without_a_clear_meaning_is_refused_with_the_fix(
    folders: dict[str, tuple[str, ...]],
    images: list[str],
    problem: str,
    fix: str,
    tmp_path: Path,
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for parent, classes in folders.items():
        write_class_folders(root / parent, *classes)
    for name in images:
        (root / name).write_bytes(b"\0")
    with pytest.raises(ValueError, match=rf"^data .*{problem}.*; .*{fix or FIX}") as error:
        list_images(root)
    assert "\n" not in str(error.value)


def test_a_class_whose_images_are_all_broken_is_refused(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "photos", "cat", "dog", count=2)
    for path in (root / "dog").iterdir():
        path.write_bytes(b"damaged")
    with (
        pytest.warns(UserWarning, match="2 broken images skipped"),
        pytest.raises(ValueError, match="has no training image of class dog that can be read"),
    ):
        load(root)


def test_a_class_of_which_no_image_is_left_for_training_is_refused(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "photos", "cat", "dog", count=1)
    with pytest.raises(ValueError, match=r"no training image of class .* is not held out.*; add"):
        load(root)


def test_broken_images_are_skipped_with_a_count(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "photos", "cat", "dog", count=6)
    (root / "cat" / "3.png").write_bytes(b"not an image")
    image = (root / "dog" / "0.png").read_bytes()
    (root / "dog" / "0.png").write_bytes(image[:-30])  # opens and does not decode
    (root / "dog" / "link.png").symlink_to(tmp_path / "nothing")
    with pytest.warns(UserWarning, match=r"3 broken images skipped: .*cat/3.*dog/0.*dog/link"):
        source = load(root)
    assert source.description.startswith("photos, 10 images of 2 classes, 3 broken skipped, 1 held")
    assert len(source.train) + len(source.validation) == 10


def test_more_classes_than_the_model_has_are_refused_with_the_fix(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "photos", *"abcde", count=1)
    with pytest.raises(ValueError, match=r"--model\.num-classes 5"):
        load(root, num_classes=3)
