"""The largest batch that runs: a search over `batch-size` in a logarithmic number of cells."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scaling.store.outcome import AXIS, LACKS_MEMORY, Outcome
from scaling.sweep.plan import CellTask
from scaling.sweep.study import Cell, Study
from unitransformer.files import write_atomically
from unitransformer.record.seals import check_seals, read_json, seal

FILE, KIND, VERSION = "largest-batches.json", "largest-batches", 1

# A cell and repeat, and the run that it comes to: another batch may come to another strategy.
PlanTask = Callable[[Cell, int], CellTask]


def search_agenda(
    tasks: Sequence[CellTask], limit: int, plan: PlanTask
) -> Callable[[Mapping[str, Outcome]], list[CellTask]]:
    """What to try, given what was found: from each task's own batch on it doubles until one does
    not fit, then halves the gap; a search ends at a cell that failed in another way.

    Args:
        tasks: where to start, one a search.
        limit: largest batch that is tried.
    """

    def agenda(done: Mapping[str, Outcome]) -> list[CellTask]:
        return [probe for task in tasks for _, probe in _probes(task, limit, plan, done)]

    return agenda


def _probes(
    task: CellTask, limit: int, plan: PlanTask, done: Mapping[str, Outcome]
) -> Iterator[tuple[int, CellTask]]:
    """Everything tried so far with its batch, and the next if there is one."""
    if task.config is None:
        yield 0, task
        return
    fits, too_large = 0, limit + 1
    size = min(task.config.batch_size, limit)
    while True:
        probe = plan(with_batch(task.cell, size), task.repeat)
        yield size, probe
        outcome = done.get(probe.name)
        if outcome is None:
            return
        if outcome.status == "ok":
            fits = size
        elif outcome.status in LACKS_MEMORY:
            too_large = size
        else:
            return
        if too_large - fits <= 1:
            return
        is_open = too_large > limit  # nothing has been too large yet
        size = min(2 * fits, limit) if is_open else (fits + too_large) // 2


def with_batch(cell: Cell, size: int) -> Cell:
    """The same cell with another batch on each device."""
    return replace(cell, options={**cell.options, AXIS: str(size)})


@dataclass(frozen=True, kw_only=True)
class BatchSearchResult:
    """What a search came to."""

    label: str  # of the cell, its batch left out
    recipe: str
    options: Mapping[str, Any]  # of the cell, its batch left out
    repeat: int
    fits: int | None  # the largest that ran; None: none did
    fits_cell: str | None  # folder of its outcome
    too_large: int | None  # the smallest that did not fit; None: the limit fits
    too_large_cell: str | None
    is_finished: bool  # else there is more to try
    stopped: str | None = None  # why it ended early

    def in_words(self, limit: int) -> str:
        fits = "" if self.fits is None else f"batch {self.fits} fits; "
        if self.stopped is not None:
            return f"{self.label}: {fits}the search stopped: {self.stopped}"
        if not self.is_finished:
            return f"{self.label}: {fits}the search is not finished"
        if self.fits is None:
            return f"{self.label}: not even a batch of {self.too_large} fits"
        end = "does not fit" if self.too_large else "is the limit of the search"
        beyond = self.too_large or limit
        return f"{self.label}: largest batch {self.fits}; {beyond} {end}"


def search_results(
    tasks: Sequence[CellTask],
    limit: int,
    plan: PlanTask,
    done: Mapping[str, Outcome],
    axes: Collection[str],
) -> list[BatchSearchResult]:
    """Where each search is; `axes` name it."""
    return [_finding(task, limit, plan, done, set(axes) - {AXIS}) for task in tasks]


def _finding(
    task: CellTask, limit: int, plan: PlanTask, done: Mapping[str, Outcome], axes: Collection[str]
) -> BatchSearchResult:
    tried = [(size, probe.name) for size, probe in _probes(task, limit, plan, done)]
    ended = {size: (name, done[name]) for size, name in tried if name in done}
    fits = [size for size, (_, outcome) in ended.items() if outcome.status == "ok"]
    too_large = [size for size, (_, o) in ended.items() if o.status in LACKS_MEMORY]
    others = [o for _, o in ended.values() if o.status not in ("ok", *LACKS_MEMORY)]
    largest, smallest = max(fits, default=None), min(too_large, default=None)
    return BatchSearchResult(
        label=task.cell.label(axes),
        recipe=task.cell.recipe,
        options={name: value for name, value in task.cell.options.items() if name != AXIS},
        repeat=task.repeat,
        fits=largest,
        fits_cell=None if largest is None else ended[largest][0],
        too_large=smallest,
        too_large_cell=None if smallest is None else ended[smallest][0],
        is_finished=len(ended) == len(tried),
        stopped=f"{others[0].status}: {others[0].reason}" if others else None,
    )


def write_search_results(found: Sequence[BatchSearchResult], limit: int, folder: Path) -> Path:
    """Put them into the folder of the sweep, whole or not at all; raises OSError."""
    searches = [asdict(each) for each in found]
    content = {"kind": KIND, "version": VERSION, "limit": limit, "searches": searches}
    path = folder / FILE
    write_atomically(path, json.dumps(seal(content), indent=1).encode())
    return path


def load_search_results(path: Path) -> tuple[int, list[BatchSearchResult]]:
    """The limit of the searches and what each came to.

    Raises:
        ValueError: not such a file as it was written, or of another version.
        OSError: it cannot be read.
    """
    values = read_json(path)
    if not isinstance(values, Mapping) or values.get("kind") != KIND:
        raise ValueError(f"{path}: holds no largest batches")
    if values.get("version") != VERSION:
        raise ValueError(
            f"{path}: version is {values.get('version')!r}; this one reads {VERSION}: run the "
            "sweep again"
        )
    check_seals(values, str(path))
    return values["limit"], [BatchSearchResult(**each) for each in values["searches"]]


def check_start(study: Study) -> None:
    """Raises ValueError for a study that sweeps the batch itself."""
    if AXIS in study.varied():
        raise ValueError(
            f"{AXIS} has several values and find-max-batch looks for the largest; give one to "
            "start from, or leave it out"
        )


def check_limit(tasks: Sequence[CellTask], memory_limit_bytes: int | None) -> None:
    """Raises ValueError for a search that would end at nothing but the whole machine."""
    if memory_limit_bytes is None and any(
        task.config is not None and task.config.parallel.accelerator == "cpu" for task in tasks
    ):
        raise ValueError(
            "find-max-batch on a CPU needs a memory-limit: without one a batch that is too large "
            "takes the memory of everything on this machine; give one, as --memory-limit 4GiB"
        )
