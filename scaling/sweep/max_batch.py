"""Searches the largest batch size that fits, with a number of cells logarithmic in it."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scaling.store.outcome import AXIS, OUT_OF_MEMORY, CellOutcome
from scaling.sweep.plan import CellTask
from scaling.sweep.study import Cell, Study
from unitransformer.files import write_atomically
from unitransformer.record.checksums import add_checksums

FILE, KIND, VERSION = "largest-batches.json", "largest-batches", 1

# Resolves a cell and repeat; with another batch size, strategy auto may choose another strategy.
PlanTask = Callable[[Cell, int], CellTask]


def search_agenda(
    tasks: Sequence[CellTask], limit: int, plan: PlanTask
) -> Callable[[Mapping[str, CellOutcome]], list[CellTask]]:
    """Returns the agenda of a sweep that searches from each task's batch size.

    A search doubles the batch size until it does not fit or reaches `limit`, then halves the gap.
    It ends at a cell that fails for another reason.
    """
    return lambda done: [probe for task in tasks for _, probe in _probes(task, limit, plan, done)]


def _probes(
    task: CellTask, limit: int, plan: PlanTask, done: Mapping[str, CellOutcome]
) -> Iterator[tuple[int, CellTask]]:
    """Yields the batch size and task of every probe so far, and of the next one if any."""
    if task.config is None:
        yield 0, task
        return
    fits, too_large = 0, limit + 1
    size = min(task.config.batch_size, limit)
    while True:
        probe = plan(with_batch(task.cell, size), task.repeat)
        yield size, probe
        outcome = done.get(probe.name)
        if outcome is None or outcome.status not in ("ok", *OUT_OF_MEMORY):
            return
        if outcome.status == "ok":
            fits = size
        else:
            too_large = size
        if too_large - fits <= 1:
            return
        size = min(2 * fits, limit) if too_large > limit else (fits + too_large) // 2


def with_batch(cell: Cell, size: int) -> Cell:
    return replace(cell, options={**cell.options, AXIS: str(size)})


@dataclass(frozen=True, kw_only=True)
class BatchSearchResult:
    """The result of one search; the fields are those of the stored file."""

    label: str  # of the cell without its batch size
    recipe: str
    options: Mapping[str, Any]  # of the cell without its batch size
    repeat: int
    fits: int | None  # the largest batch size that ran; None: none did
    fits_cell: str | None  # the folder of its outcome
    too_large: int | None  # the smallest batch size that did not fit; None: the limit fits
    too_large_cell: str | None
    is_finished: bool
    stopped: str | None = None  # the failure that ended the search early

    def format(self, limit: int) -> str:
        fits = "" if self.fits is None else f"batch size {self.fits} fits; "
        if self.stopped is not None:
            return f"{self.label}: {fits}the search stopped: {self.stopped}"
        if not self.is_finished:
            return f"{self.label}: {fits}the search is not finished"
        if self.fits is None:
            return f"{self.label}: not even batch size {self.too_large} fits"
        is_limit = self.too_large is None
        beyond = f"{limit} is the search limit" if is_limit else f"{self.too_large} does not fit"
        return f"{self.label}: largest batch size {self.fits}; {beyond}"


def search_results(
    tasks: Sequence[CellTask],
    limit: int,
    plan: PlanTask,
    done: Mapping[str, CellOutcome],
    axes: Collection[str],
) -> list[BatchSearchResult]:
    """Returns the state of each search; `axes` are those that its label shows."""
    results = []
    for task in tasks:
        names = {size: probe.name for size, probe in _probes(task, limit, plan, done)}
        ended = {size: done[name] for size, name in names.items() if name in done}
        fits = max((n for n, o in ended.items() if o.status == "ok"), default=None)
        too_large = min((n for n, o in ended.items() if o.status in OUT_OF_MEMORY), default=None)
        failed = [o for o in ended.values() if o.status not in ("ok", *OUT_OF_MEMORY)]
        result = BatchSearchResult(
            label=task.cell.label(set(axes) - {AXIS}),
            recipe=task.cell.recipe,
            options={name: value for name, value in task.cell.options.items() if name != AXIS},
            repeat=task.repeat,
            fits=fits,
            fits_cell=None if fits is None else names[fits],
            too_large=too_large,
            too_large_cell=None if too_large is None else names[too_large],
            is_finished=len(ended) == len(names),
            stopped=f"{failed[0].status}: {failed[0].reason}" if failed else None,
        )
        results.append(result)
    return results


def write_search_results(results: Sequence[BatchSearchResult], limit: int, folder: Path) -> Path:
    """Writes the results atomically into the folder of the sweep; raises OSError."""
    searches = [asdict(result) for result in results]
    content = {"kind": KIND, "version": VERSION, "limit": limit, "searches": searches}
    path = folder / FILE
    write_atomically(path, json.dumps(add_checksums(content), indent=1).encode())
    return path


def check_start(study: Study) -> None:
    """Raises ValueError for a study that sweeps the batch size itself."""
    if AXIS in study.varied_axes():
        raise ValueError(
            f"{AXIS} has several values, but find-max-batch searches the largest; give one to "
            "start from, or leave it out"
        )


def check_limit(tasks: Sequence[CellTask], memory_limit_bytes: int | None) -> None:
    """Raises ValueError for a search that only the memory of the whole machine would end."""
    if memory_limit_bytes is None and any(
        task.config is not None and task.config.parallel.accelerator == "cpu" for task in tasks
    ):
        raise ValueError(
            "find-max-batch on a CPU needs a memory-limit: without one, a batch that is too large "
            "uses up the memory of the machine; give one, for example --memory-limit 4GiB"
        )
