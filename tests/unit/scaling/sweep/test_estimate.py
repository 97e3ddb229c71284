"""Tests the estimate of a sweep: cells, commands, time, memory, device-hours and cost."""

import csv
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from recipes import bert, gpt, vit
from scaling.sweep import estimate
from scaling.sweep.estimate import CPU_START_S, load_calibrations, render_plan
from scaling.sweep.plan import (
    CellTask,
    RecipePlanner,
    plan_tasks,
    train_flops,
)
from scaling.sweep.study import Cell, load_study, read_study
from tests.builders.machines import MACHINE
from tests.builders.modules import open_here
from tests.builders.sweeps import make_study, make_tasks
from unitransformer.config import ParallelConfig
from unitransformer.machine.calibration import Calibration, Ceiling, WorkSamples
from unitransformer.machine.calibration_store import default_path, write_calibration

# Seconds of the cells of the study `quick`, whole and in steps, on a machine with two cores.
MEASURED = Path(__file__).parent / "quick_cells.csv"


def make_calibration(device: str, **flops_per_s: int) -> Calibration:
    """The ceilings of a rank by dtype."""
    ceilings = tuple(
        Ceiling(
            device=device,
            dtype=dtype,
            threads=None,
            matmul=(WorkSamples(name="product", work=work, seconds=(1.0,)),),
            copy=WorkSamples(name="copy", work=10**9, seconds=(1.0,)),
            elapsed_s=1.0,
        )
        for dtype, work in flops_per_s.items()
    )
    return Calibration(
        machine=MACHINE,
        made_at="2026-01-01T00:00:00+00:00",
        command="",
        device=device,
        num_ranks=1,
        left_out={},
        ranks=(ceilings,),
        collectives={},
        elapsed_s=1.0,
    )


def make_two(**parallel: object) -> tuple[list[CellTask], int]:
    """Two cells of ten steps, one with twice the batch, and the FLOPs per step of the smaller."""
    tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": ["8", "16"]}))
    changed = []
    for task in tasks:
        assert task.config is not None
        chosen = ParallelConfig(**{"accelerator": "cpu", "strategy": "single"} | parallel)
        changed.append(replace(task, config=replace(task.config, max_steps=10, parallel=chosen)))
    assert changed[0].config is not None
    return changed, round(train_flops(changed[0].config) / 10)


def test_estimated_cpu_time_is_start_up_plus_steps_with_overhead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "CPU_START_S", 20.0)
    monkeypatch.setattr(estimate, "CPU_OVERHEAD", 0.5)
    tasks, step_flops = make_two()
    # At this ceiling the products of a step take 4 s and 8 s; overhead adds 0.5 x 2 s.
    calibration = make_calibration("cpu", float32=step_flops // 4)
    lines = render_plan(tasks, {"cpu": calibration}, price_per_hour=3600.0).splitlines()
    assert lines[5] == f"{tasks[0].name}  {tasks[0].cell.command}"
    assert lines[6] == "    about 70 s, at least 40 s; 1 rank, about 0.2 MiB per rank"
    assert lines[7] == f"{tasks[1].name}  {tasks[1].cell.command}"
    assert lines[8].startswith("    about 2 min, at least 80 s; ")  # 20 + 80 + 14 s
    assert lines[:5] == [
        "2 cells",
        "about 3 min: 20.0 s of start-up per cell, and an overhead of each step as measured on a "
        "machine with two cores",
        "at least 2 min: matrix products at this machine's ceiling",
        "about 0.0512 device-hours, cost 184.14",  # 184.14 s at 1 a second
        "",
    ]


def test_an_estimate_for_gpus_is_a_lower_bound_and_prices_every_device() -> None:
    tasks, step_flops = make_two(accelerator="cuda", strategy="ddp", devices=2)
    # Two devices share twice as many FLOPs.
    calibration = make_calibration("cuda", float32=step_flops // 2 // 36)
    actual = render_plan(tasks, {"cuda": calibration}, price_per_hour=2.5).splitlines()
    assert actual[5].startswith("    at least 6 min; 2 ranks, about ")
    assert actual[5].endswith(" per rank")
    assert actual[:3] == [
        "2 cells",
        "at least 18 min: matrix products at this machine's ceiling, without start-up and "
        "overhead, which are unknown on GPUs",
        "at least 0.6 device-hours, cost 1.50",  # 2 devices for 6 + 12 minutes
    ]


def test_a_calibration_of_two_ranks_on_a_cpu_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNITRANSFORMER_DATA", str(tmp_path))
    tasks, step_flops = make_two()
    one = make_calibration("cpu", float32=step_flops // 4)
    half = make_calibration("cpu", float32=step_flops // 8)
    two = replace(half, num_ranks=2, ranks=half.ranks * 2)
    times = []
    for calibration in (two, one):
        write_calibration(calibration, default_path(calibration))
        loaded = load_calibrations(MACHINE.fingerprint)
        times.append(estimate.estimate_cell(tasks[0], loaded).least_s)
    assert times == [pytest.approx(40, rel=0.01)] * 2


def test_an_estimate_names_unknowns_and_refused_cells_cost_nothing() -> None:
    tasks, step_flops = make_two()
    refused = CellTask(cell=Cell(recipe="gpt", options={}), repeat=1, config=None, refusal="no GPU")
    actual = render_plan([*tasks, refused], {"cpu": None}, price_per_hour=None).splitlines()
    assert actual[4].startswith("    no time estimate; 1 rank, about ")
    assert actual[8] == "    refused: no GPU"
    assert actual[:2] == [
        "3 cells, 1 of them refused",
        "no time estimate: this machine has no calibration "
        "(run `python -m scaling calibrate` first, or plan for other nodes with --hardware)",
    ]
    calibration = make_calibration("cpu", float32=step_flops // 4)
    paid = render_plan([*tasks, refused], {"cpu": calibration}, price_per_hour=None)
    alone = render_plan(tasks, {"cpu": calibration}, price_per_hour=None)
    assert paid.splitlines()[1:4] == alone.splitlines()[1:4]


# ---------------------------------------------------------------------------------- as measured


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> RecipePlanner:
    monkeypatch.setattr("scaling.sweep.plan.open_module", open_here)
    return RecipePlanner()


def test_the_estimate_of_the_quick_study_is_near_its_measured_time(planner: RecipePlanner) -> None:
    """The measured sweep ran on a machine with two cores and these ceilings."""
    calibration = make_calibration("cpu", float32=172 * 10**9, bfloat16=24 * 10**9)
    with MEASURED.open(newline="") as file:
        measured = {tuple(row.values())[:6]: row for row in csv.DictReader(file)}
    took_s, start_s, likely_s = [], [], []
    for task in plan_tasks(load_study("quick"), planner):
        axes = ("strategy", "devices", "precision", "batch-size")
        key = (task.cell.recipe, *(task.cell.options[axis] for axis in axes), str(task.repeat))
        row = measured.pop(key)
        likely_s.append(estimate.estimate_cell(task, {"cpu": calibration}).likely_s)
        took_s.append(float(row["elapsed_s"]))
        start_s.append(float(row["elapsed_s"]) - float(row["steps_s"]))
    assert not measured
    assert statistics.median(start_s) == pytest.approx(CPU_START_S, abs=0.1)
    assert sum(took_s) / 2 < sum(likely_s) < sum(took_s) * 2
    near = sum(took / 2 < likely < took * 2 for took, likely in zip(took_s, likely_s, strict=True))
    assert near > 0.85 * len(took_s)


@pytest.mark.parametrize(
    ("recipe", "batch_size", "took_s"), [("bert", 64, 0.238), ("gpt", 8, 1.425), ("vit", 8, 1.998)]
)
def test_estimated_reference_steps_are_near_their_measured_time(
    recipe: str, batch_size: int, took_s: float, planner: RecipePlanner
) -> None:
    calibration = make_calibration("cpu", float32=172 * 10**9, bfloat16=24 * 10**9)
    options = {"accelerator": "cpu", "strategy": "single", "batch-size": str(batch_size)}
    study = read_study({"recipe": recipe, "axes": options})
    (task,) = plan_tasks(study, planner)
    assert task.config is not None
    likely_s = estimate.estimate_cell(task, {"cpu": calibration}).likely_s
    assert likely_s is not None
    step_s = (likely_s - CPU_START_S) / task.config.max_steps
    assert took_s / 2 < step_s < took_s * 2


def test_the_laptop_study_takes_half_an_hour_at_reference_sizes(planner: RecipePlanner) -> None:
    """On two hardware threads with the ceilings that the study names."""
    calibration = make_calibration("cpu", float32=330 * 10**9, bfloat16=1820 * 10**9)
    tasks = plan_tasks(load_study("laptop"), planner)
    assert len(tasks) == 2 * 57
    configs = [task.config for task in tasks]
    models = {config and config.recipe: config and config.model for config in configs}
    for preset in (bert.PRESET, gpt.PRESET, vit.PRESET):
        reference = replace(preset.model_config("reference"), dropout=0.0)
        assert models[preset.recipe] == reference
    likely_s = [estimate.estimate_cell(task, {"cpu": calibration}).likely_s for task in tasks]
    assert max(likely_s) < 60
    assert sum(likely_s) < 25 * 60  # communication and longer starts come on top
