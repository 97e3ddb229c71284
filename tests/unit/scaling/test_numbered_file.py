"""Tests that files with numbers never replace each other."""

import os
from pathlib import Path
from typing import Any

import pytest

from scaling import numbered_file
from scaling.numbered_file import write_numbered


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse_links(*arguments: Any) -> None:
    raise PermissionError(1, "Operation not permitted")  # of FAT, and of some mounts


@pytest.fixture(params=[os.link, refuse_links], ids=["hard links", "no hard links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbered_file.os, "link", request.param)


@pytest.mark.usefixtures("links")
def test_the_next_number_follows_the_highest(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    write_numbered(b"first", folder, "a")
    (folder / "a-7.json").write_text("seventh")
    (folder / "a-b.json").write_text("of something else")
    assert write_numbered(b"eighth", folder, "a") == folder / "a-8.json"
    assert names(folder) == ["a-1.json", "a-7.json", "a-8.json", "a-b.json"]


@pytest.mark.usefixtures("links")
def test_two_writers_that_choose_one_number_keep_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbered(b"of the faster writer", tmp_path, "a")
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(()))  # as listed before
    assert write_numbered(b"of the slower writer", tmp_path, "a").name == "a-2.json"
    assert names(tmp_path) == ["a-1.json", "a-2.json"]
    assert (tmp_path / "a-1.json").read_bytes() == b"of the faster writer"


def test_a_file_that_cannot_be_published_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def is_full(source: Path, target: Path) -> Path:
        if target.name == "a-1.json":
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(numbered_file.os, "link", refuse_links)
    monkeypatch.setattr(Path, "replace", is_full)
    with pytest.raises(OSError, match="No space left"):
        write_numbered(b"text", tmp_path, "a")
    assert names(tmp_path) == []


def test_a_link_that_a_file_server_reports_as_there_is_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(numbered_file.os, "link", link_twice)
    assert write_numbered(b"text", tmp_path, "a").name == "a-1.json"
    assert names(tmp_path) == ["a-1.json"]
