"""Dropout of each rank its own, and a command that starts its own ranks."""

import subprocess
from pathlib import Path

import pytest

from recipes import gpt
from tests.distributed.launching import environment, load, recipe_command, train
from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.training import TrainingModule


def test_dropout_repeats_between_runs(tmp_path: Path) -> None:
    options = ("--batch-size", "4", "--devices", "2", "--dropout", "0.5")
    first = train("gpt", tmp_path / "first", *options)
    again = train("gpt", tmp_path / "again", *options)
    assert first["loss"] == again["loss"]


def test_two_ranks_draw_different_dropout() -> None:
    config = RunConfig(
        recipe="gpt",
        size="reference",
        model=gpt.model_config(width=8, num_layers=1, num_heads=1, feedforward_width=8),
        parallel=ParallelConfig(devices=2),
    )
    module = TrainingModule(config)
    seeds = [[module.dropout_seed(batch, rank=rank) for batch in range(3)] for rank in range(2)]
    assert len({seed for rank in seeds for seed in rank}) == 6


def test_the_command_line_starts_its_own_ranks(tmp_path: Path, repository: Path) -> None:
    one = train("gpt", tmp_path / "one", "--batch-size", "8")
    done = subprocess.run(
        recipe_command("gpt", tmp_path / "two", "--batch-size", "4", "--devices", "2"),
        cwd=repository,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation  loss") == 1  # only rank 0 speaks
    assert load(tmp_path / "two")["loss"] == pytest.approx(one["loss"], rel=1e-5)
