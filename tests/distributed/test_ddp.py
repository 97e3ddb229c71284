"""Several processes over gloo train the model that one process trains."""

from pathlib import Path

import pytest

from tests.distributed.launching import train


@pytest.mark.parametrize("recipe", ["bert", "gpt", "vit"])
def test_two_ranks_train_the_model_that_one_trains(
    recipe: str, tmp_path: Path, repository: Path
) -> None:
    one = train(recipe, tmp_path / "one", repository, "--batch-size", "8")
    two = train(recipe, tmp_path / "two", repository, "--batch-size", "4", "--devices", "2")
    assert two["world_size"] == 2
    assert two["global_batch_size"] == one["global_batch_size"] == 8
    assert len(two["peak_bytes"]) == len(two["hardware"]) == 2
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["validation"]["loss"] == pytest.approx(one["validation"]["loss"], rel=1e-5)


def test_two_ranks_accumulate_what_one_takes_at_once(tmp_path: Path, repository: Path) -> None:
    one = train("gpt", tmp_path / "one", repository, "--batch-size", "8")
    options = ("--batch-size", "2", "--devices", "2", "--accumulate", "2")
    two = train("gpt", tmp_path / "two", repository, *options)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_dropout_differs_between_ranks_and_repeats_between_runs(
    tmp_path: Path, repository: Path
) -> None:
    options = ("--batch-size", "4", "--devices", "2", "--dropout", "0.5")
    first = train("gpt", tmp_path / "first", repository, *options)
    again = train("gpt", tmp_path / "again", repository, *options)
    assert first["loss"] == again["loss"]
