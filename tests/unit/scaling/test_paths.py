"""Tests why a path leads to nothing."""

from pathlib import Path

import pytest

from scaling.paths import why_missing
from scaling.prediction.hardware import load_hardware


def test_each_kind_of_missing_path_is_described(tmp_path: Path) -> None:
    assert why_missing(tmp_path / "nowhere") == "does not exist"
    (tmp_path / "dangling").symlink_to("nowhere")
    actual = why_missing(tmp_path / "dangling")
    assert actual == "is a symbolic link to nowhere, which does not exist"
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert why_missing(tmp_path / "a") == "is a symbolic link that leads back to itself"


def test_a_hardware_file_that_is_a_loop_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    with pytest.raises(ValueError, match=r"loop\.toml is a symbolic link that leads back"):
        load_hardware(str(tmp_path / "loop.toml"))
