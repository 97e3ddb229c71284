"""Ranks draw different dropout, and a command starts its own ranks."""

import re
from pathlib import Path

import pytest

from recipes import gpt
from tests.distributed.launching import begin, load, train
from tests.processes import PATIENCE_S
from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.launch.environment import adopt_launcher
from unitransformer.training.module import TrainingModule


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


def test_a_command_starts_its_own_ranks(tmp_path: Path) -> None:
    one = train("gpt", tmp_path / "one", "--batch-size", "8")
    process = begin("gpt", tmp_path / "two", "--batch-size", "4", "--devices", "2", is_whole=True)
    process.join(PATIENCE_S)
    said = (tmp_path / "two" / "output.log").read_text()
    assert process.exitcode == 0, said
    assert said.count("validation  loss") == 1  # only rank 0 prints
    assert load(tmp_path / "two")["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"SLURM_NTASKS": "2"},
            "the job has 2 tasks and this process is not one of them: start it",
        ),
        ({"SLURM_JOB_NUM_NODES": "2"}, "the job has 2 nodes and this is one process on one of"),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "0"}, None),  # started by srun, on purpose
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"}, None),
    ],
)
def test_a_command_in_a_batch_script_that_leaves_tasks_or_nodes_idle_is_refused(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        adopt_launcher()
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        adopt_launcher()
