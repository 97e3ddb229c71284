"""Several processes over gloo train the model that one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = [
    *("--model.width", "16", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.feedforward-width", "32", "--dropout", "0", "--max-steps", "6"),
    *("--validate-every", "6", "--validation-batches", "1", "--accelerator", "cpu"),
]
TEXT = ["--model.num-classes", "300", "--model.num-positions", "16"]
PICTURES = ["--model.image-size", "16", "--model.patch-size", "8"]


def train(recipe: str, folder: Path, repository: Path, *options: str) -> dict[str, object]:
    data = folder.parent / "text.txt"
    data.write_text("".join(f"{a} times {b} makes {a * b}\n" for a in range(60) for b in range(20)))
    shape = PICTURES if recipe == "vit" else [*TEXT, "--data", str(data)]
    record = folder / "record.json"
    environment = {**os.environ, "UNITRANSFORMER_CACHE": str(folder.parent / "cache")}
    arguments = [*TINY, *shape, "--out", str(folder), "--record", str(record), *options]
    done = subprocess.run(
        [sys.executable, "-m", f"recipes.{recipe}", *arguments],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(record.read_text())


@pytest.mark.parametrize("recipe", ["bert", "gpt", "vit"])
def test_two_ranks_train_the_model_that_one_trains(
    recipe: str, tmp_path: Path, repository: Path
) -> None:
    one = train(recipe, tmp_path / "one", repository, "--batch-size", "8")
    two = train(recipe, tmp_path / "two", repository, "--batch-size", "4", "--devices", "2")
    assert two["world_size"] == 2
    assert two["global_batch_size"] == one["global_batch_size"] == 8
    assert len(two["peak_bytes"]) == len(two["hardware"]) == 2  # type: ignore[arg-type]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["validation"]["loss"] == pytest.approx(one["validation"]["loss"], rel=1e-5)  # type: ignore[index]


def test_dropout_differs_between_ranks_and_repeats_between_runs(
    tmp_path: Path, repository: Path
) -> None:
    options = ("--batch-size", "4", "--devices", "2", "--dropout", "0.5")
    first = train("gpt", tmp_path / "first", repository, *options)
    again = train("gpt", tmp_path / "again", repository, *options)
    assert first["loss"] == again["loss"]
