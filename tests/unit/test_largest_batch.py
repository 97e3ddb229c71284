"""The largest batch that runs: how it is looked for, and what is kept of the search."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_sweep import Silent, Straw, make_study, make_sweep, make_task, make_tasks

from scaling.store.outcome import load_outcome
from scaling.sweep import max_batch
from scaling.sweep.engine import CELLS
from scaling.sweep.plan import Task
from scaling.sweep.study import Cell


@pytest.mark.parametrize("capacity", [0, 1, 7, 8, 9, 24, 63, 64, 99, 100, 1000])
def test_the_largest_batch_is_found_in_a_logarithmic_number_of_cells(
    tmp_path: Path, capacity: int
) -> None:
    study = make_study(axes={"precision": "32-true"})
    (task,) = make_tasks(study)
    agenda = max_batch.search([task], 100, make_task)
    one, straw = make_sweep(tmp_path / "s", [], straw=Straw({}, capacity=capacity), agenda=agenda)
    one.work(Silent())
    _, done = one.look()
    (found,) = max_batch.findings([task], 100, make_task, done, ["precision"])
    assert (found.fits or 0) == min(capacity, 100)
    assert found.too_large == (capacity + 1 if capacity < 100 else None)
    assert len(straw.runs) <= 14
    assert Counter(straw.runs).most_common(1)[0][1] == 1


def test_a_search_that_meets_another_failure_says_so(tmp_path: Path) -> None:
    (task,) = make_tasks(make_study(axes={"precision": "32-true"}))
    broken = make_task(max_batch.with_batch(task.cell, 16), 1).name
    agenda = max_batch.search([task], 100, make_task)
    straw = Straw({}, crashes=frozenset({broken}))
    one, _ = make_sweep(tmp_path / "s", [], straw=straw, agenda=agenda)
    one.work(Silent())
    (found,) = max_batch.findings([task], 100, make_task, one.look()[1], [])
    assert found.fits == 8
    assert found.in_words(100) == (
        "gpt: batch 8 fits; the search stopped: crashed: rank 0: RuntimeError: it broke"
    )


def test_every_batch_of_a_search_is_planned_anew(tmp_path: Path) -> None:
    """As with strategy auto, which shards what would not fit whole."""

    def plan(cell: Cell, repeat: int) -> Task:
        task = make_task(cell, repeat)
        assert task.config is not None
        strategy = "fsdp" if task.config.batch_size >= 16 else "ddp"
        parallel = replace(task.config.parallel, strategy=strategy)
        return replace(task, config=replace(task.config, parallel=parallel))

    (task,) = make_tasks(make_study(axes={"precision": "32-true"}))
    one, _ = make_sweep(tmp_path / "s", [], agenda=max_batch.search([task], 20, plan))
    one.work(Silent())
    configs = [outcome.config for outcome in one.look()[1].values() if outcome.config]
    told = {config.batch_size: config.parallel.strategy for config in configs}
    assert told == {8: "ddp", 16: "fsdp", 20: "fsdp"}


def test_what_a_search_came_to_is_kept_in_the_folder(tmp_path: Path) -> None:
    (task,) = make_tasks(make_study(axes={"precision": "32-true"}))
    agenda = max_batch.search([task], 100, make_task)
    one, _ = make_sweep(tmp_path / "s", [], agenda=agenda)
    one.work(Silent(), max_cells=1)
    (begun,) = max_batch.findings([task], 100, make_task, one.look()[1], [])
    assert begun.in_words(100) == "gpt: batch 8 fits; the search is not finished"
    one.work(Silent())
    found = max_batch.findings([task], 100, make_task, one.look()[1], [])
    path = max_batch.write_findings(found, 100, tmp_path / "s")
    assert max_batch.load_findings(path) == (100, found)
    (kept,) = found
    assert (kept.fits, kept.too_large, kept.options) == (24, 25, {"precision": "32-true"})
    statuses = {
        load_outcome(tmp_path / "s" / CELLS / str(cell) / "outcome.json").status
        for cell in (kept.fits_cell, kept.too_large_cell)
    }
    assert statuses == {"ok", "oom"}
    path.write_text(path.read_text().replace('"fits": 24', '"fits": 25'))
    with pytest.raises(ValueError, match="searches was changed after it was written"):
        max_batch.load_findings(path)


def test_a_search_on_a_cpu_needs_a_limit() -> None:
    tasks = make_tasks(make_study())
    with pytest.raises(ValueError, match=r"on a CPU needs a memory-limit: .* --memory-limit 4GiB"):
        max_batch.check_limit(tasks, None)
    max_batch.check_limit(tasks, 2**30)
    max_batch.check_limit([replace(tasks[0], config=None, refusal="no GPU")], None)
