"""What a record says of the code that ran."""

import subprocess
from pathlib import Path

import pytest

from unitransformer import recording
from unitransformer.recording import describe_code


def git(checkout: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=checkout, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The code's place is a repository of its own."""
    module = tmp_path / "unitransformer" / "recording.py"
    module.parent.mkdir()
    module.write_text("")
    (tmp_path / "RESULTS.md").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    monkeypatch.setattr(recording, "__file__", str(module))
    return tmp_path


@pytest.mark.parametrize(
    ("written", "is_dirty"),
    [
        ("scaling/results/records/0123-1.json", False),
        ("RESULTS.md", False),
        ("unitransformer/recording.py", True),
        ("unitransformer/another.py", True),
        ("constraints.txt", True),
    ],
)
def test_code_is_changed_by_code_and_not_by_what_runs_write(
    written: str, is_dirty: bool, checkout: Path
) -> None:
    assert describe_code()["is_dirty"] is False
    (checkout / written).parent.mkdir(parents=True, exist_ok=True)
    (checkout / written).write_text("changed")
    assert describe_code()["is_dirty"] is is_dirty


def test_outside_a_checkout_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "__file__", str(tmp_path / "recording.py"))
    assert describe_code() == {"commit": None, "is_dirty": None}
