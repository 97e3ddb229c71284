"""The largest batch that runs: a search over `batch-size` in a logarithmic number of cells."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from scaling.outcomes import Outcome
from scaling.study import Study
from scaling.tasks import Task

AXIS = "batch-size"
LACKS_MEMORY = ("oom", "oom-inferred")


def search(tasks: Sequence[Task], limit: int) -> Callable[[Mapping[str, Outcome]], list[Task]]:
    """What to try, given what was found: from each task's own batch on it doubles until one does
    not fit, then halves the gap; a search ends at a cell that failed in another way.

    Args:
        tasks: where to start, one a search.
        limit: largest batch that is tried.
    """

    def agenda(done: Mapping[str, Outcome]) -> list[Task]:
        return [probe for task in tasks for probe in _probes(task, limit, done)]

    return agenda


def _probes(task: Task, limit: int, done: Mapping[str, Outcome]) -> Iterator[Task]:
    """Everything tried so far, and the next if there is one."""
    if task.config is None:
        yield task
        return
    fits, too_large = 0, limit + 1
    size = min(task.config.batch_size, limit)
    while True:
        probe = with_batch(task, size)
        yield probe
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


def with_batch(task: Task, size: int) -> Task:
    """The same cell with another batch on each device."""
    assert task.config is not None
    options = {**task.cell.options, AXIS: str(size)}
    return replace(
        task,
        cell=replace(task.cell, options=options),
        config=replace(task.config, batch_size=size),
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    label: str  # of the cell, its batch left out
    fits: int | None  # the largest that ran; None: none did
    too_large: int | None  # the smallest that did not fit; None: the limit fits
    stopped: str | None = None  # why it ended early

    def in_words(self, limit: int) -> str:
        if self.stopped is not None:
            fits = "" if self.fits is None else f"batch {self.fits} fits; "
            return f"{self.label}: {fits}the search stopped: {self.stopped}"
        if self.fits is None:
            return f"{self.label}: not even a batch of {self.too_large} fits"
        end = "does not fit" if self.too_large else "is the limit of the search"
        beyond = self.too_large or limit
        return f"{self.label}: largest batch {self.fits}; {beyond} {end}"


def findings(
    tasks: Sequence[Task], limit: int, done: Mapping[str, Outcome], axes: Collection[str]
) -> list[Found]:
    """The end of each search; `axes` name it."""
    return [_finding(task, limit, done, set(axes) - {AXIS}) for task in tasks]


def _finding(task: Task, limit: int, done: Mapping[str, Outcome], axes: Collection[str]) -> Found:
    label = task.cell.label(axes)
    if task.config is None:
        return Found(label=label, fits=None, too_large=None, stopped=f"refused: {task.refusal}")
    tried = [(probe, done.get(probe.name)) for probe in _probes(task, limit, done)]
    sizes = {
        probe.config.batch_size: outcome
        for probe, outcome in tried
        if outcome is not None and probe.config is not None
    }
    fits = [size for size, outcome in sizes.items() if outcome.status == "ok"]
    too_large = [size for size, outcome in sizes.items() if outcome.status in LACKS_MEMORY]
    others = [o for o in sizes.values() if o.status not in ("ok", *LACKS_MEMORY)]
    return Found(
        label=label,
        fits=max(fits, default=None),
        too_large=min(too_large, default=None),
        stopped=f"{others[0].status}: {others[0].reason}" if others else None,
    )


def check_start(study: Study) -> None:
    """Raises ValueError for a study that sweeps the batch itself."""
    if AXIS in study.varied():
        raise ValueError(
            f"{AXIS} has several values and find-max-batch looks for the largest; give one to "
            "start from, or leave it out"
        )
