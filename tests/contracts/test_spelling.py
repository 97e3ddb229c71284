"""Checks that the spelling check of `make check` finds misspellings and words given up."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("text", ["a seperate file", "record['samples_untold']", "pictures"])
def test_spelling_check_finds_misspelt_and_old_words(
    text: str, tmp_path: Path, repository: Path
) -> None:
    (tmp_path / "a.py").write_text(f"# {text}\n")
    assert any(_runs(command, tmp_path / "a.py", repository) for command in _commands(repository))
    (tmp_path / "a.py").write_text("# samples of a separate record\n")
    assert not any(
        _runs(command, tmp_path / "a.py", repository) for command in _commands(repository)
    )


def _commands(repository: Path) -> list[list[str]]:
    """The spelling commands of the Makefile without the paths that they check."""
    lines = (repository / "Makefile").read_text().splitlines()
    start = "\t$(BIN)/codespell "
    return [
        [word.strip("'") for word in line.removeprefix(start).split() if "SPELLED" not in word]
        for line in lines
        if line.startswith(start)
    ]


def _runs(options: list[str], file: Path, repository: Path) -> int:
    """Returns the exit code of the check of one file."""
    command = [sys.executable, "-m", "codespell_lib", *options, str(file)]
    return subprocess.run(command, cwd=repository, capture_output=True).returncode
