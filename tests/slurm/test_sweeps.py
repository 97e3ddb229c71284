"""Tests sweeps over array tasks on a real SLURM."""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scaling import __main__ as scaling
from slurm import submit
from tests.processes import PATIENCE_S
from tests.slurm.cluster import Cluster, until
from tests.slurm.waiting import (
    STEPS,
    log_of,
    slow_down_first_start,
    statuses_of,
    tiny,
    wait_for_outcome,
    wait_for_status,
)
from unitransformer.record.slurm_job import seconds_of

pytestmark = pytest.mark.timeout(1800)  # of several waits


def axes_of(work: Path, **axes: str) -> list[str]:
    """Options of a sweep over tiny cells."""
    arguments = tiny(work / "x")
    options = dict(zip(arguments[::2], arguments[1::2], strict=True)) | {
        "--recipe": "gpt",
        "--out": str(work / "swept"),
        **{f"--{name.replace('_', '-')}": value for name, value in axes.items()},
    }
    return [word for pair in options.items() for word in pair]


def test_a_sweep_is_shared_by_the_tasks_of_an_array(
    cluster: Cluster, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = axes_of(work, batch_size="2,4")
    folder = work / "job"
    options = ["--time", "10", "--max-parallel", "2", "--folder", str(folder)]
    assert submit.main(["sweep", *options, "--", *arguments]) == 0
    assert "tasks 0-1%2" in capsys.readouterr().out
    until((work / "swept/study.json").exists, "the sweep has begun")
    first = f"{json.loads((folder / 'submitted').read_text())['job']}_0"
    until(lambda: cluster.state(first)["JobState"] != "PENDING", "the first task has its node")
    assert cluster.state(first)["NumCPUs"] == "16"  # all GPUs of the node
    watching = subprocess.run(
        [sys.executable, "-m", "scaling", "sweep", *arguments, "--watch"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert "2/2" in watching.stdout
    assert statuses_of(work) == ["ok"] * 2
    for task in range(2):
        wait_for_outcome(folder / f"task-{task}", "done")
    wait_for_status(folder, re.escape("2/2 cells (2 ok)"))
    # Once more: no cell runs again, and the report contains all of them.
    before = {path: path.stat().st_mtime_ns for path in (work / "swept/cells").rglob("*")}
    subprocess.run(["sbatch", "--array=1", folder / "job.sbatch"], check=True)
    until(lambda: "no cells left to run: 2 ok" in log_of(folder), "it says so")
    assert {path: path.stat().st_mtime_ns for path in (work / "swept/cells").rglob("*")} == before
    assert scaling.main(["report", str(work / "swept"), "--out", str(work / "RESULTS.md")]) == 0
    assert "\n2 runs, measured on " in (work / "RESULTS.md").read_text()
    assert "2 records used (2 ok), 2 cells of sweeps" in capsys.readouterr().out


def test_a_cell_interrupted_by_a_signal_has_no_outcome_and_runs_again(
    cluster: Cluster, work: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupts the ready script; SLURM signals every process of a step."""
    slow_down_first_start(work, repository, monkeypatch, tasks="0 1")  # both cells run at once
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("UNITRANSFORMER_JOB_FOLDER", str(work / "job"))
    monkeypatch.chdir(repository)
    arguments = axes_of(work, batch_size="2,4", max_steps=str(STEPS), validate_every=str(STEPS))
    options = ("--array=0-1", "--time=10", f"--output={work}/log-%a", "slurm/sweep.sbatch")
    array = cluster.run("sbatch", "--parsable", *options, *arguments).strip()
    cells = work / "swept/cells"
    until(lambda: len(list(cells.glob("*/progress"))) == 2, "both cells run")
    wait_for_status(work / "job", rf"{array}_0 .* running +\d+/{STEPS} ")
    for task, number in enumerate(("TERM", "USR1")):
        cluster.run("scancel", f"--signal={number}", f"{array}_{task}")
    for task in range(2):
        wait_for_outcome(work / f"job/task-{task}", "stopped")
    assert statuses_of(work) == []
    for task in range(2):
        cluster.hurry(f"{array}_{task}")
    for task in range(2):
        wait_for_outcome(work / f"job/task-{task}", "done")
        assert cluster.state(f"{array}_{task}")["Restarts"] == "1"
    assert statuses_of(work) == ["ok", "ok"]


@pytest.mark.proof
@pytest.mark.alone
def test_a_sweep_adds_less_than_two_percent_to_the_time_of_its_cells(
    cluster: Cluster,
    work: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cells of at least 20 s, with and without SLURM, on one node and on two."""
    slow_down_first_start(work, repository, monkeypatch)
    axes = {"batch_size": "2,4,8", "max_steps": "20", "validate_every": "20", "devices": "1"}
    arguments = axes_of(work, num_nodes="1,2", strategy="ddp", time_limit="600", **axes)
    options = ["--time", "1:00:00", "--devices", "1", "--max-parallel", "1"]
    assert submit.main(["sweep", *options, "--folder", str(work / "job"), "--", *arguments]) == 0
    for number in range(1, 7):
        until(lambda: len(statuses_of(work)) >= number, f"{number} cells have ended")  # noqa: B023
    command = [sys.executable, "-m", "scaling", "sweep"]
    here = axes_of(work, out=str(work / "here"), strategy="ddp", **axes)
    subprocess.run([*command, *here], env={**os.environ, "SLURM_JOB_ID": "0"}, check=True)  # slow
    in_jobs = outcomes_in(work / "swept")
    places = {
        f"a job on {number}": [cell for cell in in_jobs if cell["options"]["num-nodes"] == number]
        for number in ("1", "2")
    }
    for where, cells in {**places, "no job": outcomes_in(work / "here")}.items():
        spans = [cell["elapsed_s"] for cell in cells]
        ends = [seconds_of(cell["finished_at"]) for cell in cells]
        assert len(cells) == 3
        assert min(spans) > 20
        # From the second cell: the first one waits until the worker has imported torch.
        added = [
            after - before - span
            for (before, after), span in zip(itertools.pairwise(ends), spans[1:], strict=True)
        ]
        share = statistics.median(added) / statistics.median(spans)
        with capsys.disabled():
            print(f"\n{where}: cells of {spans} s, {added} s for the sweep: {100 * share:.2f} %")
        assert share < 0.02


def outcomes_in(folder: Path) -> list[dict[str, Any]]:
    """Returns the outcomes of the cells of a sweep, in the order in which they ran."""
    outcomes = [json.loads(path.read_text()) for path in folder.glob("cells/*/outcome.json")]
    return sorted(outcomes, key=lambda outcome: str(outcome["started_at"]))
