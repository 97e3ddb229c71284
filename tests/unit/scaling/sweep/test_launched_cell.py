"""Tests a cell on several nodes without SLURM: ranks of torchrun run the same command."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scaling import __main__ as scaling
from scaling.store.outcome import CellOutcome, load_outcome, write_outcome
from scaling.sweep.claims import claim
from scaling.sweep.launched_cell import launch_lines
from scaling.sweep.plan import CellTask
from scaling.sweep.study import Cell, read_study
from tests.builders.fake_recipes import write_fake_recipes
from tests.processes import PATIENCE_S

AXES = {"num-nodes": ["1", "2"], "batch-size": ["2"]}


@pytest.fixture
def cells(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells of a study whose recipes are fake, one on one node and one on two."""
    cells = read_study({"recipe": ["gpt"], "axes": AXES}).cells()
    write_fake_recipes(tmp_path / "fake", cells, seconds=0)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fake'}:{repository}")
    monkeypatch.chdir(tmp_path)
    return cells


def options(cell: Cell | None = None) -> list[str]:
    axes = [word for name, values in AXES.items() for word in (f"--{name}", ",".join(values))]
    chosen = [] if cell is None else ["--run-cell", f"{cell.id}-1"]
    return ["sweep", "--recipe", "gpt", *axes, "--out", "S", *chosen]


# The command of a rank, with a shorter wait for a note of the same launch.
SCALING = (
    "import sys; from scaling import __main__; from scaling.sweep import launched_cell; "
    "launched_cell.STALE_S = 0.5; sys.exit(__main__.run_main(__main__.main))"
)


def rank_of_torchrun(rank: int, cell: Cell, nodes: int = 2) -> "subprocess.Popen[str]":
    variables = {"RANK": str(rank), "WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": "1"}
    variables["SLURM_STEP_NUM_TASKS"] = str(nodes)  # for which the first fake rank waits
    return subprocess.Popen(
        [sys.executable, "-c", SCALING, *options(cell)],
        env={**os.environ, **variables, "LOCAL_RANK": "0", "SLURM_PROCID": str(rank)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("cause", "code", "printed"),
    [
        ("claimed", 2, "which another process runs on "),
        ("refused", 2, "1 cell finished (1 refused)"),
        ("signal", 2, "stopped by SIGTERM"),
        ("done", 0, "ok already; --retry ok runs it again"),
    ],
)
def test_the_other_ranks_end_when_the_first_one_does_not_run_the_cell(
    cause: str,
    code: int,
    printed: str,
    cells: list[Cell],
    tmp_path: Path,
) -> None:
    two = cells[1]
    assert scaling.main([*options(), "--prepare"]) == 0
    (tmp_path / "fake/hold").touch()  # as ranks wait for the first one
    plan = tmp_path / "fake/recipes/service/plan.py"
    with contextlib.ExitStack() as claimed:
        if cause == "claimed":
            claimed.enter_context(claim(Path("S"), f"{two.id}-1") or pytest.fail("not claimed"))
        elif cause == "refused":
            refusal = 'print(json.dumps({"refused": "no such shape"}), flush=True); continue'
            plan.write_text(plan.read_text().replace("config = ", f"{refusal}\n        config = "))
        elif cause == "signal":
            plan.write_text("import os; os.kill(os.getppid(), 15)\n" + plan.read_text())
        other = rank_of_torchrun(1, two)
        until_begun = time.monotonic() + PATIENCE_S
        while two.id not in Path("fake/ranks").read_text() and time.monotonic() < until_begun:
            time.sleep(0.05)
        if cause == "done":  # on the other node, a cache still hides the outcome
            outcome = CellOutcome(
                cell=two.id,
                repeat=1,
                recipe="gpt",
                options=two.options,
                command=two.command,
                status="ok",
                record="x-1.json",
            )
            write_outcome(outcome, Path(f"S/cells/{two.id}-1"))
        first = rank_of_torchrun(0, two)
        said = first.communicate(timeout=PATIENCE_S)[0]
        text = other.communicate(timeout=PATIENCE_S)[0]
    if cause != "signal":
        assert printed in said
    assert other.returncode == code
    assert ("error: the first rank has not run " in text) == (code != 0)
    assert printed in text


def run_ranks(cell: Cell, nodes: int = 2) -> Mapping[int, tuple[int, str]]:
    """Exit code and output of each rank."""
    ranks = [rank_of_torchrun(rank, cell, nodes) for rank in range(nodes)]
    printed = [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks]
    return {n: (r.returncode, text) for n, (r, text) in enumerate(zip(ranks, printed, strict=True))}


def test_a_search_over_nodes_names_slurm_since_torchrun_runs_single_cells() -> None:
    cells = read_study({"recipe": ["gpt"], "axes": AXES}).cells()
    configs: list[Any] = [
        SimpleNamespace(parallel=SimpleNamespace(num_nodes=number)) for number in (1, 2)
    ]
    tasks = [
        CellTask(cell=cell, repeat=1, config=config)
        for cell, config in zip(cells, configs, strict=True)
    ]
    (line,) = launch_lines(tasks, ["--find-max-batch", "8"], is_search=True)
    assert line == "1 search needs several nodes, and so SLURM: python -m slurm.submit sweep\n"
    assert launch_lines(tasks[:1], [], is_search=True) == []


def test_a_sweep_prints_the_command_for_every_node_and_its_ranks_run_the_cell(
    cells: list[Cell], capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = cells
    assert scaling.main(options()) == 0
    printed = capfd.readouterr().out
    assert "1/2 gpt, num-nodes 1: ok" in printed
    assert "1 cell needs several nodes." in printed
    assert "torchrun --nnodes 2 --node-rank RANK --nproc-per-node 1 --master-addr " in printed
    assert f"-m scaling {' '.join(options(two))}\n" in printed
    ended = run_ranks(two)
    assert [code for code, _ in ended.values()] == [0, 0]
    assert "1 cell finished (1 ok)" in ended[0][1]
    outcome = load_outcome(Path(f"S/cells/{two.id}-1/outcome.json"))
    assert (outcome.status, outcome.record) == ("ok", "x-1.json")
    begun = {
        line.split()[2] for line in Path("fake/ranks").read_text().splitlines() if two.id in line
    }
    assert begun == {"0", "1"}
    assert f"{two.id}-1: ok already; --retry ok runs it again" in run_ranks(two)[0][1]
    assert scaling.main(options()) == 0
    assert "torchrun" not in capfd.readouterr().out
    assert load_outcome(Path(f"S/cells/{one.id}-1/outcome.json")).status == "ok"


def test_bad_launches_of_a_cell_are_one_line_and_no_outcome(
    cells: list[Cell], capfd: pytest.CaptureFixture[str]
) -> None:
    two = cells[1]
    assert scaling.main(options(two)) == 2
    assert "and no torchrun has started this process" in capfd.readouterr().err
    assert scaling.main([*options(), "--run-cell", "x"]) == 2
    assert "run-cell is x, and the study has no such cell" in capfd.readouterr().err
    text = rank_of_torchrun(0, two, nodes=3).communicate(timeout=PATIENCE_S)[0]
    assert "which runs 1 ranks on each of 2 nodes, and torchrun has started 1 on each of 3" in text
    Path("S").mkdir(exist_ok=True)
    claimed = claim(Path("S"), f"{two.id}-1")
    assert claimed is not None
    with claimed:
        held = rank_of_torchrun(0, two).communicate(timeout=PATIENCE_S)[0]
    assert "which another process runs on " in held
    assert not Path(f"S/cells/{two.id}-1/outcome.json").exists()
    assert scaling.main([*options(), "--only-nodes", "2"]) == 2
    assert "only-nodes is 2, and this process is not in a SLURM job" in capfd.readouterr().err


def test_the_rank_that_failed_first_is_in_the_outcome(cells: list[Cell], tmp_path: Path) -> None:
    two = cells[1]
    path = tmp_path / "fake/recipes/gpt.py"
    fault = 'if rank == "1":\n    os.kill(os.getpid(), 9)\ntime.sleep(1)\nsys.exit(1)\n'
    path.write_text(path.read_text().replace("if rank ==", f"{fault}if rank ==", 1))
    codes = {rank: code for rank, (code, _) in run_ranks(two).items()}
    assert codes == {0: 1, 1: 137}
    outcome = load_outcome(Path(f"S/cells/{two.id}-1/outcome.json"))
    assert outcome.status == "crashed"
    assert outcome.reason is not None
    assert "rank 1 on " in outcome.reason
    assert json.loads(Path("S/study.json").read_text())["kind"] == "study"
