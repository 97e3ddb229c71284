"""Kills nodes under a sweep over several nodes, on a real SLURM with fake recipes.

`pytest tests/slurm/test_faults_in_sweeps.py --whole-proof` runs 66 cells on 32 nodes, five times.
"""

import contextlib
import os
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from scaling import __main__ as scaling
from scaling.sweep.study import Cell, read_study
from slurm import status, submit
from slurm.job_files import list_attempts
from tests.builders.fake_recipes import write_fake_recipes
from tests.slurm.cluster import Cluster, running_cluster, until
from tests.slurm.conftest import EACH
from tests.slurm.waiting import statuses_of, wait_for_outcome, wait_for_status

pytestmark = pytest.mark.timeout(3600)
SECONDS = 2.0  # of a cell
FIRST_JOB = 20_000  # other clusters of these tests count from 1


def start(
    work: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    cluster: Cluster,
    *options: str,
    nodes: Sequence[int],
    sizes: int,
    is_held: bool = False,
    has_long_tasks: bool = False,
) -> list[Cell]:
    """Submits a sweep of fake cells, of which none ends while it is held; returns them.

    Args:
        has_long_tasks: a task runs several cells, and not one.
    """
    fields = f"{{recipe: [gpt], axes: {{num-nodes: {list(nodes)}, batch-size: {sizes}}}}}"
    numbers = list(range(1, sizes + 1))
    (work / "study.yaml").write_text(
        fields.replace(f"batch-size: {sizes}", f"batch-size: {numbers}")
    )
    axes = {"num-nodes": list(nodes), "batch-size": numbers}
    cells = read_study({"recipe": ["gpt"], "axes": axes}).cells()
    write_fake_recipes(work / "fake", cells, seconds=SECONDS)
    if is_held:
        (work / "fake/hold").touch()
    monkeypatch.setenv("PYTHONPATH", f"{work / 'fake'}:{repository}")
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)
    argv = ["sweep", str(work / "study.yaml"), "--devices", "1"]
    argv += ["--time", "1:00:00" if has_long_tasks else "30"]
    argv += ["--folder", str(work / "job"), *options, "--", "--out", str(work / "swept")]
    argv += ["--time-limit", "600"] if has_long_tasks else []  # of a cell
    assert submit.main(argv) == 0
    return cells


def ranks_of(work: Path) -> list[list[str]]:
    """Word, cell, rank and node of each line that a rank has written."""
    return [line.split() for line in (work / "fake/ranks").read_text().splitlines()]


def die(cluster: Cluster, node: str) -> None:
    """Kills a node, and declares it down, which SLURM would do after five minutes."""
    cluster.declare_dead(node)
    cluster.start_node(node)
    with contextlib.suppress(subprocess.CalledProcessError):  # it is back already
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")


def hurry_requeued(cluster: Cluster) -> list[str]:
    """Lets requeued jobs start early; returns the jobs in the queue with SLURM's reason."""
    rows = cluster.run("squeue", "--noheader", "--array", "--format=%F_%K|%r").split()
    if any(row.endswith("|BeginTime") for row in rows):
        time.sleep(3)  # the end of the last start would end the new one, which has the same id
    for job in (row.partition("|")[0] for row in rows if row.endswith("|BeginTime")):
        with contextlib.suppress(subprocess.CalledProcessError):
            cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    return rows


def wait_until_ended(cluster: Cluster, work: Path, number: int) -> None:
    """Waits for all cells and jobs."""

    def have_ended() -> bool:
        rows = hurry_requeued(cluster)
        time.sleep(0.5)
        return len(statuses_of(work)) == number and not rows

    until(have_ended, "all cells have ended")


def check_end(cluster: Cluster, work: Path, cells: Sequence[Cell]) -> None:
    wait_until_ended(cluster, work, len(cells))
    assert Counter(statuses_of(work)) == {"ok": len(cells)}
    ends = Counter(line[1] for line in ranks_of(work) if line[0] == "ends")
    assert ends.keys() == {f"{cell.id}-1" for cell in cells}
    # A node may die between the end of a run and its outcome: then the cell runs again.
    attempts = [last for path in work.glob("job/*/task-*") for last in list_attempts(path)]
    lost = [attempt for attempt in attempts if attempt.outcome != "done"]
    assert [a for a in lost if not a.is_requeued and a.outcome != "stopped"] == []
    assert lost, "no fault has struck a task"
    assert ends.total() - len(cells) <= len(lost)
    until(lambda: not processes_in(work), "no process of the sweep is left")
    assert scaling.main(["report", str(work / "swept"), "--out", str(work / "RESULTS.md")]) == 0
    assert scaling.main(["lint", str(work / "RESULTS.md")]) == 0


def processes_in(work: Path) -> list[psutil.Process]:
    """The processes of jobs here; a daemon of SLURM is of no job."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            if "SLURM_JOB_ID" in variables and str(work) in variables.get("PYTHONPATH", ""):
                found.append(process)
    return found


def draw_busy_node(cluster: Cluster, draw: random.Random) -> str:
    """A node of a running job. It may be starting, run a cell, or be between two."""
    rows: list[str] = []

    def are_running() -> bool:
        hurry_requeued(cluster)
        rows[:] = cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%N").split()
        return bool(rows)

    until(are_running, "a job runs")
    names = cluster.run("scontrol", "show", "hostnames", ",".join(rows)).split()
    return draw.choice(sorted(set(names)))


def two_nodes_cell_runs(work: Path) -> bool:
    lines = ranks_of(work)
    ended = {cell for word, cell, *_ in lines if word == "ends"}
    return any(
        word == "begins" and rank == "1" and cell not in ended for word, cell, rank, _ in lines
    )


def test_a_dead_node_costs_a_sweep_over_nodes_no_cell(
    has_slurm: None,
    work: Path,
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    names = [f"node{number}" for number in range(1, 5)]
    with running_cluster(
        tmp_path_factory.mktemp("slurm"), first_job=FIRST_JOB + EACH * worker, nodes=names
    ) as cluster:
        limits = ("--max-parallel", "1")
        cells = start(
            *(work, repository, monkeypatch, cluster, *limits),
            nodes=(1, 2),
            sizes=2,
            is_held=True,
            has_long_tasks=True,
        )
        until(lambda: two_nodes_cell_runs(work), "a cell runs on two nodes")
        node = next(line[3] for line in reversed(ranks_of(work)) if line[2] == "1")
        cluster.kill_node(node)
        (work / "fake/hold").unlink()
        until(lambda: f"rank 1 of 2: {node} stopped responding" in logs(work), "the job says so")
        die(cluster, node)
        check_end(cluster, work, cells)
        assert "2/2 cells (2 ok)" in status.report(work / "job")


def logs(work: Path) -> str:
    return "".join(path.read_text() for path in work.glob("job/*/*.log"))


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        (["swept"], "node2 does not see {}/swept/cells/"),
        (["swept", "job"], "node2 does not see {}/job/"),
    ],
)
def test_a_node_that_does_not_share_the_folder_of_a_sweep_is_named_and_no_cell_runs(
    folders: list[str],
    reason: str,
    cluster: Cluster,
    work: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder in folders:
        (work / folder).mkdir()
        cluster.hide("node2", work / folder)
    start(work, repository, monkeypatch, cluster, nodes=(2,), sizes=1)
    wait_for_outcome(work / "job/task-0", "refused")
    (attempt,) = list_attempts(work / "job/task-0")
    assert not attempt.is_requeued
    assert reason.format(work) in attempt.reason
    wait_for_status(work / "job", f" refused .*{re.escape(attempt.reason)}")
    assert statuses_of(work) == []


@pytest.mark.parametrize("seed", range(5))
def test_two_dead_nodes_and_a_preemption_cost_a_large_sweep_no_cell(
    seed: int,
    is_whole_proof: bool,
    has_slurm: None,
    work: Path,
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not is_whole_proof:
        pytest.skip("takes minutes; --whole-proof runs it")
    draw = random.Random(seed)
    names = [f"node{number}" for number in range(1, 33)]
    with running_cluster(
        tmp_path_factory.mktemp("slurm"), first_job=FIRST_JOB, nodes=names
    ) as cluster:
        limits = ("--max-parallel", "6", "--partition", "brief")
        cells = start(
            *(work, repository, monkeypatch, cluster, *limits),
            nodes=(1, 2, 4),
            sizes=22,
            has_long_tasks=True,
        )
        until(lambda: two_nodes_cell_runs(work), "a cell runs on two nodes")
        for _ in range(2):
            time.sleep(draw.uniform(0, 10))
            die(cluster, draw_busy_node(cluster, draw))
        time.sleep(draw.uniform(0, 5))
        node = draw_busy_node(cluster, draw)
        options = ("--partition=high", "--nodes=24", f"--nodelist={node}", "--exclusive")
        cluster.run("sbatch", *options, "--wrap", "sleep 1", "--output", "/dev/null")
        check_end(cluster, work, cells)
