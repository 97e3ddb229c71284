"""Builds small git repositories whose commits are known."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

IDENTITY = {
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "GIT_CONFIG_GLOBAL": os.devnull,
}
# Three of twenty samples once more through the forward pass, which has a third of a step's FLOPs.
SLOWER = """

_step = TrainingModule.training_step


def _slower_step(self, batch, batch_idx):
    with torch.no_grad():
        self.objective({name: values[:3] for name, values in batch.items()})
    return _step(self, batch, batch_idx)


TrainingModule.training_step = _slower_step
"""
# One more operator on a single number: it takes no time that could be measured.
OPERATOR = SLOWER.replace(
    "self.objective({name: values[:3] for name, values in batch.items()})", "torch.ones(()).neg()"
)


def git(repository: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(repository), *arguments],
        env={**os.environ, **IDENTITY},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def commit(repository: Path, message: str, *options: str) -> str:
    """Commits all files and returns the hash."""
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", message, *options)
    return git(repository, "rev-parse", "HEAD")


def make_repository(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--quiet", "--initial-branch", "main")
    return folder


def copy_project(source: Path, folder: Path, *, planted: str, at: int, number: int) -> list[str]:
    """Makes a repository of `number` commits of this project's code; returns their hashes.

    Args:
        planted: code that commit `at`, counted from 0, adds to the training module.
    """
    make_repository(folder)
    for name in ("unitransformer", "recipes"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    module = folder / "unitransformer/training/module.py"
    commits = []
    for index in range(number):
        if index == at:
            module.write_text(module.read_text() + planted)
        with (folder / "unitransformer/files.py").open("a") as file:
            file.write(f"# {index}\n")
        commits.append(commit(folder, f"Commit {index}"))
    return commits


def linear(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The parents of commits of which each follows the one before."""
    return {name: () if i == 0 else (names[i - 1],) for i, name in enumerate(names)}
