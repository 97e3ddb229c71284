"""Orders the records of a cell by time and finds where its step time changed. Never a gate.

Records belong to one history if their config, processors and clocks are the same. Only records with
the same versions are compared by the search for change points: a new version is a known change.
"""

import datetime
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy

from scaling.store.conditions import machine_differences
from scaling.store.run import Run
from unitransformer.record.units import format_count

if TYPE_CHECKING:
    import changeforest

ALPHA = 0.02  # of the test; 1 to 4 % of simulated histories without a change show one
MIN_RECORDS = 8  # with the same versions; fewer can be in order by chance more often than that
MIN_SEGMENT = 3  # records on either side of a change point: one slow run is none
COMMIT_LETTERS = 8


@dataclass(frozen=True, kw_only=True)
class TrendPoint:
    """A record in the history of a cell."""

    seconds: float  # of its median steady step
    started_at: datetime.datetime
    commit: str  # shortened; with + after it if there were uncommitted changes
    versions: dict[str, str]
    run: Run


@dataclass(frozen=True, kw_only=True)
class Change:
    """A place in a history where the step time changed, or may have."""

    index: int  # of the first record after it
    what: str  # "change point", or the versions that changed
    before_s: float  # median over the records back to the previous change
    after_s: float
    is_found: bool  # in the step times; False: known from the versions
    p_value: float | None = None

    @property
    def ratio(self) -> float:
        return self.after_s / self.before_s


@dataclass(frozen=True, kw_only=True)
class History:
    """The records of one cell on one kind of machine, by time."""

    points: tuple[TrendPoint, ...]
    changes: tuple[Change, ...]  # by index
    too_few: tuple[str, ...]  # a line for each version whose records cannot show a change point

    @property
    def cell(self) -> str:
        """The hash in the names of its records."""
        return self.points[0].run.config.hash()

    @property
    def title(self) -> str:
        config = self.points[0].run.config
        parallel = config.parallel
        devices = format_count(parallel.world_size, "device")
        compiled = "" if parallel.compile == "off" else f", compile {parallel.compile}"
        return (
            f"{config.recipe} {config.size}, batch {config.batch_size:,}, {parallel.precision}"
            f"{compiled}, {parallel.strategy} on {devices}"
        )

    @property
    def machine(self) -> str:
        hosts = self.points[0].run.record["hardware"]
        kinds = {
            f"{host.get('cpu_cores')} cores of {host.get('cpu')}"
            if host.get("device") == "cpu"
            else str(host.get("device"))
            for host in hosts
        }
        return " and ".join(sorted(kinds))

    @property
    def can_change(self) -> bool:
        """Whether it shows something: a change, or enough records to find none."""
        return bool(self.changes) or not self.too_few

    @property
    def clock(self) -> str:
        return "processor time" if uses_processor_time(self.points[0].run) else "wall time"

    @property
    def bounds(self) -> list[int]:
        """Where segments without a change begin, and the number of records."""
        return [0, *(change.index for change in self.changes), len(self.points)]


def uses_processor_time(run: Run) -> bool:
    """Whether the processor clock decides: it does for one process that computes on a CPU.

    Several ranks also burn processor time while they wait for each other.
    """
    hosts = run.record["hardware"]
    return len(hosts) == 1 and hosts[0].get("device") == "cpu"


def find_histories(runs: Iterable[Run]) -> tuple[list[History], list[str]]:
    """Returns the history of each cell, the longest first, and why records were left out.

    Args:
        runs: that ended well.
    """
    groups: list[list[TrendPoint]] = []
    left_out: list[str] = []
    for run in runs:
        point = _read_point(run)
        if isinstance(point, str):
            left_out.append(f"{run.name}: {point}")
            continue
        for group in groups:
            first = group[0].run
            if first.config == run.config and not machine_differences([first.record, run.record]):
                group.append(point)
                break
        else:
            groups.append([point])
    histories = [
        _build_history(points, _differing_packages(group))
        for group in groups
        for points in _split_interleaved(group)
    ]
    return sorted(histories, key=lambda history: -len(history.points)), left_out


def _read_point(run: Run) -> TrendPoint | str:
    """Returns the point of a run, or why it has none."""
    if run.metrics is None:
        return "no steady state"
    try:
        started_at = datetime.datetime.fromisoformat(run.record.get("started_at") or "")
    except (TypeError, ValueError):
        return "it does not say when it started"
    if started_at.tzinfo is None:
        started_at = started_at.replace(tzinfo=datetime.UTC)
    code = run.record["code"]
    commit = (code.get("commit") or "unknown")[:COMMIT_LETTERS]
    seconds = run.metrics.median_cpu_s if uses_processor_time(run) else run.metrics.step.median
    if seconds <= 0:
        return "its median step took no time"
    return TrendPoint(
        seconds=seconds,
        started_at=started_at,
        commit=commit if code.get("is_dirty") is False else f"{commit}+",
        versions={name: str(value) for name, value in run.record["versions"].items()},
        run=run,
    )


def _split_interleaved(group: Sequence[TrendPoint]) -> list[list[TrendPoint]]:
    """Returns histories by time, in each of which a new version replaces the one before for good.

    Versions that are measured in turn, as nightly runs with two versions of torch are, have a
    history each.
    """
    by_versions: dict[str, list[TrendPoint]] = {}
    for point in sorted(group, key=lambda point: point.started_at):
        by_versions.setdefault(repr(sorted(point.versions.items())), []).append(point)
    histories: list[list[TrendPoint]] = []
    for points in by_versions.values():
        earlier = (old for old in histories if old[-1].started_at < points[0].started_at)
        if (history := next(earlier, None)) is None:
            histories.append(points)
        else:
            history += points
    return histories


def _differing_packages(points: Sequence[TrendPoint]) -> list[str]:
    """Returns torch, and the packages in whose versions the points differ."""
    names = dict.fromkeys(["torch", *(name for point in points for name in point.versions)])
    return [
        name
        for name in names
        if name == "torch" or len({point.versions.get(name) for point in points}) > 1
    ]


def _build_history(points: Sequence[TrendPoint], packages: Sequence[str]) -> History:
    """Returns a history; `packages` tell its versions from those of the same cell."""
    found: list[tuple[int, str, float | None]] = []  # index, what, p-value
    too_few: list[str] = []
    begin = 0
    for versions, stretch in groupby(points, key=lambda point: point.versions):
        seconds = [point.seconds for point in stretch]
        if begin:
            found.append((begin, _version_changes(points[begin - 1].versions, versions), None))
        if len(seconds) < MIN_RECORDS:
            named = ", ".join(f"{name} {versions.get(name, 'unknown')}" for name in packages)
            too_few.append(
                f"{named}: {format_count(len(seconds), 'record')} of the {MIN_RECORDS} that a "
                "change point needs"
            )
        else:
            splits = find_change_points(seconds)
            found += [(begin + index, "change point", p_value) for index, p_value in splits]
        begin += len(seconds)
    bounds = [0, *(index for index, _, _ in found), len(points)]
    medians = [
        statistics.median(point.seconds for point in points[low:high])
        for low, high in pairwise(bounds)
    ]
    changes = [
        Change(
            index=index,
            what=what,
            before_s=medians[number],
            after_s=medians[number + 1],
            is_found=p_value is not None,
            p_value=p_value,
        )
        for number, (index, what, p_value) in enumerate(found)
    ]
    return History(points=tuple(points), changes=tuple(changes), too_few=tuple(too_few))


def find_change_points(seconds: Sequence[float]) -> list[tuple[int, float]]:
    """Returns each change point: the index of the first value after it, and its p-value.

    Binary segmentation with a classifier of nearest neighbors and a pseudo-permutation test
    (Londschien, Kovacs & Buehlmann 2023, "Random forests for change point detection"). It assumes
    no distribution. `MIN_RECORDS` values or more. Raises RuntimeError without changeforest.
    """
    try:
        import changeforest
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error}; install what this project needs: pip install .") from error
    # The relative length is rounded down to values; half a value keeps it from rounding to less.
    control = changeforest.Control(
        minimal_relative_segment_length=(MIN_SEGMENT - 0.5) / len(seconds),
        model_selection_alpha=ALPHA,
    )
    values = numpy.log(numpy.array(seconds, dtype=float)).reshape(-1, 1)
    result = changeforest.changeforest(values, "knn", "bs", control)
    return sorted(_splits(result))


def _splits(result: "changeforest.BinarySegmentationResult") -> Iterator[tuple[int, float]]:
    if result.is_significant:
        yield int(result.best_split), float(result.p_value)
        yield from _splits(result.left)
        yield from _splits(result.right)


def _version_changes(before: dict[str, str], after: dict[str, str]) -> str:
    """Names packages whose version changed, torch first."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    names.sort(key=lambda name: name != "torch")
    return ", ".join(
        f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}" for name in names
    )
