"""Tests how the command line names what is compared."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from scaling.comparison.options import CompareOptions, build_compare_parser, read_compare_options
from scaling.comparison.sides import check_kinds, kind_of, open_revisions, open_sides
from tests.builders.revisions import git


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two commits, `old` and `new`; it is the current folder."""
    folder = tmp_path / "checkout"
    for package in ("unitransformer", "recipes"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("")
    (folder / "constraints.txt").write_text("torch==2.13.0\n")
    (folder / "recipes/gpt.py").write_text("old")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "old")
    git(folder, "tag", "old")
    (folder / "recipes/gpt.py").write_text("new")
    git(folder, "commit", "--quiet", "-am", "new")
    git(folder, "tag", "new")
    monkeypatch.chdir(folder)
    return folder


def options(base: str, candidate: str, passed_on: Sequence[str] = ()) -> CompareOptions:
    given = build_compare_parser().parse_args([base, candidate])
    return read_compare_options(given, passed_on, ["compare", base, candidate])


def codes(base: str, candidate: str) -> tuple[list[str], list[Path]]:
    with open_sides(options(base, candidate)) as sides:
        folders = [side.code for side in sides.values()]
        return [(folder / "recipes/gpt.py").read_text() for folder in folders], folders


def test_text_names_files_options_a_config_records_or_a_revision(checkout: Path) -> None:
    texts = (".", "", "--seed 1", "constraints.txt", "recipes", "HEAD~1")
    kinds = ("files", "options", "options", "config", "records", "revision")
    assert tuple(map(kind_of, texts)) == kinds


def test_revisions_are_copied_and_the_copies_removed(checkout: Path) -> None:
    contents, folders = codes("old", "new")
    assert contents == ["old", "new"]
    assert not any(folder.exists() for folder in folders)
    assert git(checkout, "worktree", "list").count("\n") == 0
    assert git(checkout, "status", "--porcelain") == ""


def test_copies_are_removed_after_an_interrupt(checkout: Path) -> None:
    folders: list[Path] = []

    def interrupt() -> None:
        with open_sides(options("old", "new")) as sides:
            folders.extend(side.code for side in sides.values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)


def test_a_dot_takes_uncommitted_and_new_files_but_no_ignored_ones(checkout: Path) -> None:
    (checkout / "recipes/gpt.py").write_text("edited")
    (checkout / "recipes/more.py").write_text("")
    (checkout / ".gitignore").write_text("runs\n")
    (checkout / "runs").mkdir()
    (checkout / "runs/large").write_text("")
    with open_sides(options("old", ".")) as sides:
        code = sides["candidate"].code
        assert (code / "recipes/gpt.py").read_text() == "edited"
        assert (code / "recipes/more.py").exists()
        assert not (code / "runs").exists()
        (checkout / "recipes/gpt.py").write_text("edited again")
        assert (code / "recipes/gpt.py").read_text() == "edited"
        assert [side.is_dirty for side in sides.values()] == [False, True]


def test_uncommitted_changes_are_refused_between_revisions(checkout: Path) -> None:
    (checkout / "recipes/gpt.py").write_text("edited")
    with pytest.raises(ValueError, match="uncommitted changes are part of no revision; commit"):
        codes("old", "new")
    with open_sides(replace(options("old", "new"), leaves_changes_out=True)) as sides:
        assert (sides["candidate"].code / "recipes/gpt.py").read_text() == "new"


def test_a_revision_that_does_not_exist_is_refused(checkout: Path) -> None:
    with pytest.raises(ValueError, match="'nowhere' is no revision of this repository"):
        codes("old", "nowhere")


def test_a_revision_without_recipes_is_refused(checkout: Path) -> None:
    git(checkout, "rm", "-rq", "recipes")
    git(checkout, "commit", "--quiet", "-m", "none")
    with (
        pytest.raises(ValueError, match="holds no package recipes; it cannot train"),
        open_revisions(["old", "HEAD"], "gpt", ()),
    ):
        pass


def test_a_revision_that_cannot_be_copied_is_named(checkout: Path) -> None:
    (checkout / "elsewhere").symlink_to("/etc")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "a link")
    with (
        pytest.raises(RuntimeError, match=f"{git(checkout, 'rev-parse', 'HEAD')[:10]} cannot be"),
        open_revisions(["old", "HEAD"], "gpt", ()),
    ):
        pass


def test_a_folder_outside_a_repository_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the current folder is in no git repository"):
        codes("HEAD~1", "HEAD")


def test_equal_constraints_share_the_environment(checkout: Path) -> None:
    with open_sides(options("old", "new")) as sides:
        assert {side.python for side in sides.values()} == {Path(sys.executable)}


def test_options_of_a_side_follow_those_of_both(checkout: Path) -> None:
    with open_sides(options("", "--precision bf16-mixed", ["bert", "--seed", "3"])) as sides:
        both = ("--devices", "1", "--seed", "3")
        assert sides["base"].arguments == both
        assert sides["candidate"].arguments == (*both, "--precision", "bf16-mixed")
        assert {side.recipe for side in sides.values()} == {"bert"}
        assert sides["base"].code == sides["candidate"].code


def test_a_file_of_options_is_read_by_the_recipe(checkout: Path) -> None:
    (checkout / "fast.yaml").write_text("compile: default\n")
    with open_sides(options("", "fast.yaml")) as sides:
        config = str(checkout / "fast.yaml")
        assert sides["candidate"].arguments[-2:] == ("--config", config)


@pytest.mark.parametrize(
    ("base", "candidate", "message"),
    [
        (".", "HEAD", "BASE is '.', the files as they are now; name a revision as BASE"),
        ("HEAD", "--seed 1", "BASE 'HEAD' is neither a file.*CANDIDATE '--seed 1' is options"),
        ("recipes", "HEAD", "BASE 'recipes' is a folder of records"),
    ],
)
def test_sides_of_two_kinds_are_refused(
    checkout: Path, base: str, candidate: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_kinds(options(base, candidate))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 5", "--max_steps in fast.yaml of CANDIDATE is decided by the comparison"),
        ("max-steps: 5", "--max-steps in fast.yaml of CANDIDATE is decided by the comparison"),
        ("print_config: ''", "--print_config in fast.yaml of CANDIDATE is decided"),
        ("devices: 2", "devices in fast.yaml of CANDIDATE is 2; a comparison trains on one device"),
        ("config: more.yaml", "config fast.yaml of CANDIDATE names another file"),
        ("[1, 2]", "config fast.yaml of CANDIDATE is no file of options"),
        ("a: 1\na: 2", "config fast.yaml of CANDIDATE: line 2 gives a again"),
    ],
)
def test_a_file_of_options_is_checked_as_typed_options_are(
    checkout: Path, text: str, message: str
) -> None:
    (checkout / "fast.yaml").write_text(text)
    for candidate in ("fast.yaml", "--config fast.yaml"):
        with pytest.raises(ValueError, match=message), open_sides(options("", candidate)):
            pass


def test_one_device_in_a_file_of_options_is_no_contradiction(checkout: Path) -> None:
    (checkout / "fast.yaml").write_text("devices: 1\nseed:\n")
    with open_sides(options("", "fast.yaml")) as sides:
        assert sides["base"].arguments == ("--devices", "1")


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("--max-steps 5", "--max-steps of CANDIDATE is decided by the comparison; leave it out"),
        ("--devices 2", "devices of CANDIDATE is 2; a comparison trains on one device"),
        ("--seed '1", 'candidate is "--seed \'1": No closing quotation'),
    ],
)
def test_options_that_the_comparison_decides_are_refused(
    checkout: Path, candidate: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message), open_sides(options("", candidate)):
        pass
