"""Tests the search for the largest batch that fits, and its stored result."""

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from scaling.store.outcome import load_outcome
from scaling.sweep import max_batch
from scaling.sweep.engine import CELLS
from scaling.sweep.plan import CellTask
from scaling.sweep.study import Cell
from tests.builders.sweeps import FakeMachine, Silent, make_study, make_sweep, make_task, make_tasks
from unitransformer.record.checksums import read_json, verify_checksums


@pytest.mark.parametrize("capacity", [0, 1, 7, 8, 9, 24, 63, 64, 99, 100, 1000])
def test_the_search_for_the_largest_batch_runs_logarithmically_many_cells(
    tmp_path: Path, capacity: int
) -> None:
    study = make_study(axes={"precision": "32-true"})
    (task,) = make_tasks(study)
    agenda = max_batch.search_agenda([task], 100, make_task)
    one, machine = make_sweep(
        tmp_path / "s", [], machine=FakeMachine({}, capacity=capacity), agenda=agenda
    )
    one.work(Silent())
    _, done = one.scan()
    (found,) = max_batch.search_results([task], 100, make_task, done, ["precision"])
    assert (found.fits or 0) == min(capacity, 100)
    assert found.too_large == (capacity + 1 if capacity < 100 else None)
    assert len(machine.runs) <= 14
    assert Counter(machine.runs).most_common(1)[0][1] == 1


def test_a_search_reports_a_failure_that_is_not_out_of_memory(tmp_path: Path) -> None:
    (task,) = make_tasks(make_study(axes={"precision": "32-true"}))
    broken = make_task(max_batch.with_batch(task.cell, 16), 1).name
    agenda = max_batch.search_agenda([task], 100, make_task)
    machine = FakeMachine({}, crashes=frozenset({broken}))
    one, _ = make_sweep(tmp_path / "s", [], machine=machine, agenda=agenda)
    one.work(Silent())
    (found,) = max_batch.search_results([task], 100, make_task, one.scan()[1], [])
    assert found.fits == 8
    assert found.format(100) == (
        "gpt: batch size 8 fits; the search stopped: crashed: rank 0: RuntimeError: it broke"
    )


def test_a_search_plans_every_batch_size_separately(tmp_path: Path) -> None:
    """As strategy auto does: it shards a model that does not fit."""

    def plan(cell: Cell, repeat: int) -> CellTask:
        task = make_task(cell, repeat)
        assert task.config is not None
        strategy = "fsdp" if task.config.batch_size >= 16 else "ddp"
        parallel = replace(task.config.parallel, strategy=strategy)
        return replace(task, config=replace(task.config, parallel=parallel))

    (task,) = make_tasks(make_study(axes={"precision": "32-true"}))
    one, _ = make_sweep(tmp_path / "s", [], agenda=max_batch.search_agenda([task], 20, plan))
    one.work(Silent())
    configs = [outcome.config for outcome in one.scan()[1].values() if outcome.config]
    actual = {config.batch_size: config.parallel.strategy for config in configs}
    assert actual == {8: "ddp", 16: "fsdp", 20: "fsdp"}


def test_the_result_of_a_search_is_stored_in_its_folder(tmp_path: Path) -> None:
    (task,) = make_tasks(make_study(axes={"precision": "32-true"}))
    agenda = max_batch.search_agenda([task], 100, make_task)
    one, _ = make_sweep(tmp_path / "s", [], agenda=agenda)
    one.work(Silent(), max_cells=1)
    (begun,) = max_batch.search_results([task], 100, make_task, one.scan()[1], [])
    assert begun.format(100) == "gpt: batch size 8 fits; the search is not finished"
    one.work(Silent())
    found = max_batch.search_results([task], 100, make_task, one.scan()[1], [])
    path = max_batch.write_search_results(found, 100, tmp_path / "s")
    stored = read_json(path)
    verify_checksums(stored, str(path))
    assert (stored["limit"], stored["searches"]) == (100, [asdict(result) for result in found])
    (result,) = found
    assert (result.fits, result.too_large, result.options) == (24, 25, {"precision": "32-true"})
    statuses = {
        load_outcome(tmp_path / "s" / CELLS / str(cell) / "outcome.json").status
        for cell in (result.fits_cell, result.too_large_cell)
    }
    assert statuses == {"ok", "oom"}
    path.write_text(path.read_text().replace('"fits": 24', '"fits": 25'))
    with pytest.raises(ValueError, match="searches was changed after it was written"):
        verify_checksums(read_json(path), str(path))


def test_a_search_on_a_cpu_needs_a_memory_limit() -> None:
    tasks = make_tasks(make_study())
    with pytest.raises(ValueError, match=r"on a CPU needs a memory-limit: .* --memory-limit 4GiB"):
        max_batch.check_limit(tasks, None)
    max_batch.check_limit(tasks, 2**30)
    max_batch.check_limit([replace(tasks[0], config=None, refusal="no GPU")], None)
