"""Sweeps survive being killed at any moment, and several processes can share one."""

import multiprocessing
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from scaling.recipe_process import ProcessResult
from scaling.store.outcome import FILE, load_outcome
from scaling.sweep.engine import CELLS, Sweep
from scaling.sweep.plan import CellTask
from scaling.sweep.run_cell import Limits
from tests.builders.sweeps import Silent, make_record_of, make_study, make_tasks
from tests.processes import PATIENCE_S, wait_until_ended
from unitransformer.config import Recipe
from unitransformer.launch.process_tree import die_with_parent
from unitransformer.record.schema import write_record

KILLS, KILLS_IN_PROOF = 12, 50
REPEATS = "6"  # of ten cells


def outcomes(folder: Path) -> list[Any]:
    return [load_outcome(path) for path in sorted((folder / CELLS).glob(f"*/{FILE}"))]


def _cell(stock: Path, place: Path, seconds: float) -> None:
    """A process that runs for a moment and writes a complete record."""
    time.sleep(seconds)
    (place / ".half").write_bytes(stock.read_bytes())
    (place / ".half").rename(place / "x-1.json")


class Forks:
    """Runs a task in a process that ends with this one."""

    def __init__(self, stock: Path, begun: Path) -> None:
        self.stock, self.begun = stock, begun

    def __call__(self, task: CellTask) -> Any:
        def run(
            recipe: Recipe, arguments: Sequence[str], *, log: Path, **limits: Any
        ) -> ProcessResult:
            with self.begun.open("a") as begun:
                begun.write(f"{task.name}\n")
            parent = os.getpid()

            def work() -> None:
                die_with_parent(parent)
                _cell(self.stock / f"{task.name}.json", log.parent, random.uniform(0.005, 0.05))

            process = multiprocessing.get_context("fork").Process(target=work)
            process.start()
            process.join()
            return ProcessResult(exit_code=process.exitcode, elapsed_s=0.02)

        return run


def _sweep(folder: Path, tasks: Sequence[CellTask], stock: Path, begun: Path, seed: int) -> None:
    random.seed(seed)
    sweep = Sweep(
        folder=folder,
        agenda=lambda _: tasks,
        limits=Limits(limit_s=60),
        runner=Forks(stock, begun),
    )
    sweep.work(Silent())


@pytest.fixture
def fake_sweep(tmp_path: Path) -> Mapping[str, Any]:
    """Sixty cells and the record that each will write."""
    tasks = make_tasks(make_study(repeats=REPEATS))
    for task in tasks:
        assert task.config is not None
        write_record(make_record_of(task.config), tmp_path / "stock" / f"{task.name}.json")
    (tmp_path / "sweep").mkdir()
    begun = tmp_path / "begun"
    begun.touch()
    return {
        "folder": tmp_path / "sweep",
        "tasks": tasks,
        "stock": tmp_path / "stock",
        "begun": begun,
    }


def test_a_sweep_killed_at_random_moments_loses_only_unfinished_cells(
    fake_sweep: Mapping[str, Any], is_whole_proof: bool
) -> None:
    fork = multiprocessing.get_context("fork")
    chance = random.Random(0)
    finished: set[str] = set()
    kills = 0
    while kills < (KILLS_IN_PROOF if is_whole_proof else KILLS):
        if len(finished) == len(
            fake_sweep["tasks"]
        ):  # all cells are done: start again, keeping the leftovers of kills
            for path in fake_sweep["folder"].glob(f"{CELLS}/*/*"):
                path.unlink()
            fake_sweep["begun"].write_text("")
            finished = set()
        process = fork.Process(target=_sweep, kwargs={**fake_sweep, "seed": kills})
        process.start()
        time.sleep(chance.uniform(0, 0.4))
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.join()
        kills += 1
        wait_until_ended(family)
        done = {outcome.name for outcome in outcomes(fake_sweep["folder"])}  # each is complete
        assert done >= finished
        finished = done
        begun = fake_sweep["begun"].read_text().split()
        assert len(begun) <= len(done) + kills  # at most one cell per kill
    _sweep(**fake_sweep, seed=0)
    found = outcomes(fake_sweep["folder"])
    assert {outcome.name for outcome in found} == {task.name for task in fake_sweep["tasks"]}
    assert {outcome.status for outcome in found} == {"ok"}
    leftovers = [path for path in fake_sweep["folder"].rglob(".*") if path.is_file()]
    assert leftovers == []


def test_several_processes_on_one_sweep_run_no_cell_twice(fake_sweep: Mapping[str, Any]) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_sweep, kwargs={**fake_sweep, "seed": n}) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    begun = fake_sweep["begun"].read_text().split()
    assert sorted(begun) == sorted(task.name for task in fake_sweep["tasks"])
    assert len(outcomes(fake_sweep["folder"])) == len(begun)
