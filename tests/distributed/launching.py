"""Recipes started as a person starts them: by their command line, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TINY = [
    *("--model.width", "16", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.feedforward-width", "32", "--dropout", "0", "--max-steps", "6"),
    *("--validate-every", "6", "--validation-batches", "1", "--accelerator", "cpu"),
]
TEXT = ["--model.num-classes", "300", "--model.num-positions", "16"]
PICTURES = ["--model.image-size", "16", "--model.patch-size", "8"]


def recipe_command(recipe: str, folder: Path, *options: str) -> list[str]:
    """Arguments of Python that train a tiny model; the last option of a name wins."""
    data = folder.parent / "text.txt"
    data.write_text("".join(f"{a} times {b} makes {a * b}\n" for a in range(60) for b in range(20)))
    shape = PICTURES if recipe == "vit" else [*TEXT, "--data", str(data)]
    places = ["--out", str(folder), "--record", str(folder / "record.json")]
    return ["-m", f"recipes.{recipe}", *TINY, *shape, *places, *options]


def environment(folder: Path) -> dict[str, str]:
    """The variables of this process, and a cache in `folder`."""
    return {**os.environ, "UNITRANSFORMER_CACHE": str(folder / "cache")}


def load(folder: Path) -> dict[str, Any]:
    """The record of the run in `folder`."""
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record


def train(recipe: str, folder: Path, repository: Path, *options: str) -> dict[str, Any]:
    """Run a tiny recipe by its command line and return its record."""
    done = subprocess.run(
        [sys.executable, *recipe_command(recipe, folder, *options)],
        cwd=repository,
        env=environment(folder.parent),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return load(folder)
