"""Runs in; curves over device counts out: how fast more devices are.

p devices | 0 the baseline, the smallest count of a curve | n another count
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, Literal, get_args

from scaling.store.conditions import differences
from scaling.store.run import Run
from unitransformer.config import ModelConfig, RunConfig
from unitransformer.record.metrics import StepMetrics
from unitransformer.stats.comparisons import split_variance
from unitransformer.stats.intervals import CONFIDENCE, t_quantile

Scaling = Literal["strong", "weak"]
LEAST_COUNTS = 2
ENOUGH_LAUNCHES = 5  # of one config, whose interval needs no other config
LEAST_FREEDOM = ENOUGH_LAUNCHES - 1  # degrees of freedom of a pooled scatter
# In these the runs of a curve may differ.
VARYING_ON_A_CURVE = {
    *("batch_size", "accumulate"),
    *("parallel.devices", "parallel.num_nodes", "parallel.strategy"),
}

# ---------------------------------------------------------------------------------- estimates


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its 95 % interval; `low` and `high` are None together, with a reason."""

    value: float
    low: float | None = None
    high: float | None = None
    reason: str | None = None  # why there is no interval

    @property
    def log_half_width(self) -> float | None:
        """Half the interval of the logarithm, of what is above 0: 0.01 is 1 % to either side."""
        if self.low is None or self.high is None:
            return None
        return math.log(self.high / self.low) / 2

    def times(self, factor: float) -> "Estimate":
        """The same of another unit."""
        ends = [None if end is None else end * factor for end in (self.low, self.high)]
        return replace(self, value=self.value * factor, low=ends[0], high=ends[1])

    def inverse(self) -> "Estimate":
        """Of the ratio the other way round."""
        ends = [None if end is None else 1 / end for end in (self.high, self.low)]
        return replace(self, value=1 / self.value, low=ends[0], high=ends[1])


def ratio(over: Estimate, under: Estimate) -> Estimate:
    """Of two rates that were measured apart: the variances of their logarithms add up."""
    value = over.value / under.value
    half, other_half = over.log_half_width, under.log_half_width
    if half is None or other_half is None:
        return Estimate(value=value, reason=over.reason or under.reason)
    factor = math.exp(math.hypot(half, other_half))
    return Estimate(value=value, low=value / factor, high=value * factor)


def pooled_rate(runs: Sequence[Run]) -> Estimate:
    """Tokens or pictures a second of launches of one config, of all devices together.

    One launch has the interval of its steps, which says nothing of another launch; several have
    that of `split_variance`.

    Raises:
        ValueError: runs of several configs, a run without a steady state.
    """
    configs = {run.config for run in runs}
    if len(configs) != 1:
        raise ValueError(f"runs have {len(configs)} configs; give the launches of one")
    readouts = [steady_metrics(run) for run in runs]
    if len(runs) == 1:
        (only,) = readouts
        low, high = only.low_units_per_s, only.high_units_per_s
        return Estimate(value=only.units_per_s, low=low, high=high, reason=only.step.reason)
    per_step = runs[0].units_per_step
    variance = split_variance([run.launch for run in runs])
    if variance.median is None or variance.low is None or variance.high is None:
        return Estimate(value=per_step / median(variance.medians), reason=variance.reason)
    return Estimate(
        value=per_step / variance.median, low=per_step / variance.high, high=per_step / variance.low
    )


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """How much launches of one config differ, pooled over several configs.

    Two launches alone have an interval with one degree of freedom, 13 standard errors to either
    side. Configs of one model on one kind of machine share their scatter instead.
    """

    deviation: float  # standard deviation of the logarithm of a launch's median step
    freedom: int  # launches less configs

    def around(self, value: float, launches: int) -> Estimate:
        """A rate over so many launches, with its interval."""
        error = self.deviation / math.sqrt(launches)
        factor = math.exp(t_quantile((1 + CONFIDENCE) / 2, self.freedom) * error)
        return Estimate(value=value, low=value / factor, high=value * factor)


ModelOnMachine = tuple[ModelConfig, str]  # a model, and the processors it ran on


def find_scatters(runs: Iterable[Run]) -> dict[ModelOnMachine, Scatter]:
    """For each model and kind of processors with enough repeated launches."""
    medians: dict[ModelOnMachine, dict[RunConfig, list[float]]] = {}
    for run in runs:
        if run.is_ok and run.metrics is not None:
            configs = medians.setdefault((run.config.model, run.processors), {})
            configs.setdefault(run.config, []).append(math.log(run.metrics.step.median))
    scatters = {}
    for kind, configs in medians.items():
        freedom = sum(len(logs) - 1 for logs in configs.values())
        squares = sum((log - fmean(logs)) ** 2 for logs in configs.values() for log in logs)
        if freedom >= LEAST_FREEDOM and squares > 0:
            scatters[kind] = Scatter(deviation=math.sqrt(squares / freedom), freedom=freedom)
    return scatters


def steady_metrics(run: Run) -> StepMetrics:
    if not run.is_ok or run.metrics is None:
        raise ValueError(f"run {run.name} has no steady state; measure it for longer")
    return run.metrics


# ---------------------------------------------------------------------------------- curves


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """The launches of one config, and their rate together."""

    runs: tuple[Run, ...]
    rate: Estimate  # tokens or images per second, of all devices together
    is_pooled: bool = False  # the interval comes from the scatter of several configs

    @property
    def config(self) -> RunConfig:
        return self.runs[0].config

    @property
    def devices(self) -> int:
        return self.config.parallel.world_size

    @property
    def middle(self) -> Run:
        """The launch whose rate is in the middle, of two the slower one."""
        in_order = sorted(self.runs, key=lambda run: (run.units_per_s or 0.0, run.name))
        return in_order[(len(in_order) - 1) // 2]


def drift(points: Iterable[MeasuredPoint]) -> float | None:
    """By how much the machine itself differed between the jobs of these points: the highest ceiling
    that any rank measured over the lowest, less 1. None: not every rank measured one."""
    ceilings = [c for point in points for run in point.runs for c in run.record["ceiling"]]
    told = [ceiling["matmul_flops_per_s"] for ceiling in ceilings if ceiling is not None]
    if not told or len(told) < len(ceilings):
        return None
    return float(max(told) / min(told)) - 1


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One config over two device counts or more, from the smallest on."""

    scaling: Scaling  # strong: the same global batch; weak: the same batch a device
    strategy: str
    points: tuple[MeasuredPoint, ...]
    remarks: tuple[str, ...]  # how it was put together
    differing_conditions: tuple[
        str, ...
    ]  # conditions in which its records differ, numbered along the points

    @property
    def baseline(self) -> MeasuredPoint:
        """The smallest count there is, which need not be 1."""
        return self.points[0]

    def speedup(self, point: MeasuredPoint) -> Estimate:
        """Rate over that of the baseline."""
        if point is self.baseline:
            return Estimate(value=1.0, reason="the baseline itself")
        return ratio(point.rate, self.baseline.rate)

    def efficiency(self, point: MeasuredPoint) -> Estimate:
        """Rate a device over that of the baseline: (rate_n / rate_0) (p_0 / p_n), strong or weak.

        Of a weak curve it is the baseline's step time over that of the point.
        """
        return self.speedup(point).times(self.baseline.devices / point.devices)

    @functools.cached_property
    def threads(self) -> tuple[int, ...] | None:
        """Of a rank, by point, where a CPU has fewer for more devices: they share its cores. None
        where each device brings its own."""
        told: list[int] = []
        for point in self.points:
            ranks = [host for run in point.runs for host in run.record["hardware"]]
            own = {host.get("threads") for host in ranks}
            if {host["device"] for host in ranks} != {"cpu"} or len(own) > 1 or None in own:
                return None
            told += own
        is_split = len(set(told)) > 1 and told == sorted(told, reverse=True)
        return tuple(told) if is_split else None

    def drift(self, point: MeasuredPoint) -> float | None:
        """Of the machine, between the jobs of the point and of the baseline; None also where their
        ranks have other numbers of threads, with other ceilings."""
        return None if self.threads is not None else drift([self.baseline, point])

    def ideal(self, point: MeasuredPoint) -> float:
        """The efficiency that loses nothing: 1, or the share that is left of a rank's cores."""
        if self.threads is None:
            return 1.0
        return self.threads[self.points.index(point)] / self.threads[0]


def batch_of(curve: Curve) -> str:
    """In words: a strong curve keeps the whole batch, a weak one the batch of a device."""
    config = curve.baseline.config
    if curve.scaling == "strong":
        return f"{config.global_batch_size} in all"
    micro_batches = f" x {config.accumulate} micro-batches" if config.accumulate > 1 else ""
    return f"{config.batch_size} a device{micro_batches}"


def find_curves(runs: Iterable[Run], scatters: Mapping[ModelOnMachine, Scatter] | None = None) -> list[Curve]:
    """Every strong and weak curve of at least two device counts.

    On a curve everything is equal but `devices` and `num_nodes`, and on a strong one how the global
    batch is divided; processors and devices of other kinds are on curves of their own. A strategy
    without a run on one device borrows that of `single`. Runs
    that did not end well or have no steady state are on none.
    """
    usable = sorted(
        (run for run in runs if run.is_ok and run.metrics is not None), key=lambda run: run.name
    )
    scatters = find_scatters(usable) if scatters is None else scatters
    processors = [run.processors for run in usable]
    found = []
    for scaling in get_args(Scaling):
        groups: dict[tuple[Any, ...], list[Run]] = {}
        for run, kind in zip(usable, processors, strict=True):
            groups.setdefault((*_spread_aside(run.config, scaling), kind), []).append(run)
        for key in sorted((key for key in groups if _is_curve(groups[key])), key=repr):
            names = {run.config.parallel.strategy for run in groups[key]} - {"single"}
            found += [
                _curve(scaling, strategy, groups[key], scatters) for strategy in sorted(names)
            ]
    return [curve for curve in found if len(curve.points) >= LEAST_COUNTS]


def _is_curve(group: Sequence[Run]) -> bool:
    return len({run.config.parallel.world_size for run in group}) >= LEAST_COUNTS


def _spread_aside(config: RunConfig, scaling: Scaling) -> tuple[Any, ...]:
    """What all runs of a curve share, whatever their strategy; the number is the batch."""
    parallel = vars(config.parallel) | {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    shared = vars(config) | {"parallel": tuple(parallel.values())}
    if scaling == "weak":
        return (*shared.values(), config.batch_size * config.accumulate)
    return (*(shared | {"batch_size": 1, "accumulate": 1}).values(), config.global_batch_size)


def pool(
    runs: Iterable[Run], scatters: Mapping[ModelOnMachine, Scatter] | None = None
) -> list[MeasuredPoint]:
    """A point for each config on each kind of processors.

    Args:
        scatters: as `find_scatters` finds them, by default in these runs. Up to four launches have
            the interval of their model's scatter, if there is one.
    """
    runs = list(runs)
    scatters = find_scatters(runs) if scatters is None else scatters
    cells: dict[tuple[RunConfig, str], list[Run]] = {}
    for run in runs:
        cells.setdefault((run.config, run.processors), []).append(run)
    return [
        _point(launches, scatters.get((config.model, kind)))
        for (config, kind), launches in cells.items()
    ]


def _point(launches: Sequence[Run], scatter: Scatter | None) -> MeasuredPoint:
    rate = pooled_rate(launches)
    if scatter is None or len(launches) >= ENOUGH_LAUNCHES:
        return MeasuredPoint(runs=tuple(launches), rate=rate)
    pooled = scatter.around(rate.value, len(launches))
    return MeasuredPoint(runs=tuple(launches), rate=pooled, is_pooled=True)


def _curve(
    scaling: Scaling, strategy: str, group: Sequence[Run], scatters: Mapping[ModelOnMachine, Scatter]
) -> Curve:
    own = [run for run in group if run.config.parallel.strategy == strategy]
    alone = [run for run in group if run.config.parallel.strategy == "single"]
    remarks = []
    if alone and all(run.config.parallel.world_size > 1 for run in own):
        own += alone
        remarks.append(f"1 device is strategy single: {strategy} was not measured on one")
    counts: dict[int, list[MeasuredPoint]] = {}
    for point in pool(own, scatters):
        counts.setdefault(point.devices, []).append(point)
    points = []
    for devices, ways in sorted(counts.items()):
        fastest = max(ways, key=lambda point: point.rate.value)
        points.append(fastest)
        if len(ways) > 1:
            remarks.append(
                f"on {devices} devices the fastest of {len(ways)} ways to spread the batch stands: "
                f"{_spread(fastest.config)}"
            )
    records = [run.record for point in points for run in point.runs]
    return Curve(
        scaling=scaling,
        strategy=strategy,
        points=tuple(points),
        remarks=tuple(remarks),
        differing_conditions=tuple(differences(records)),
    )


def _spread(config: RunConfig) -> str:
    """How a global batch is divided, in words."""
    parallel = config.parallel
    nodes = f"{parallel.num_nodes} nodes x " if parallel.num_nodes > 1 else ""
    return (
        f"{config.batch_size} a device x {config.accumulate} micro-batches x "
        f"{nodes}{parallel.devices} devices"
    )
