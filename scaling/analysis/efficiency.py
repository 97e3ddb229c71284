"""Builds scaling curves from runs: speed-up and efficiency by device count, with intervals."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, Literal, get_args

from scaling.analysis.same_work import without_length
from scaling.store.conditions import differences
from scaling.store.run import Run
from unitransformer.config import ModelConfig, RunConfig
from unitransformer.record.metrics import StepMetrics
from unitransformer.stats.comparisons import split_variance
from unitransformer.stats.intervals import CONFIDENCE, t_quantile

Scaling = Literal["strong", "weak"]
LEAST_COUNTS = 2
ENOUGH_LAUNCHES = 5  # from which a config needs no scatter of other configs
LEAST_FREEDOM = ENOUGH_LAUNCHES - 1  # degrees of freedom of a pooled scatter
VARYING_ON_A_CURVE = {  # settings in which the runs of a curve may differ
    "batch_size",
    "accumulate",
    "parallel.devices",
    "parallel.num_nodes",
    "parallel.strategy",
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95 % interval; `low` and `high` are None together, with a reason."""

    value: float
    low: float | None = None
    high: float | None = None
    reason: str | None = None  # why there is no interval

    @property
    def log_half_width(self) -> float | None:
        """Half the width of the interval of the logarithm: 0.01 is 1 % to either side."""
        if self.low is None or self.high is None:
            return None
        return math.log(self.high / self.low) / 2

    def times(self, factor: float) -> "Estimate":
        low, high = (end and end * factor for end in (self.low, self.high))
        return replace(self, value=self.value * factor, low=low, high=high)

    def inverse(self) -> "Estimate":
        low, high = (end and 1 / end for end in (self.high, self.low))
        return replace(self, value=1 / self.value, low=low, high=high)


def ratio(over: Estimate, under: Estimate) -> Estimate:
    """Divides independent rates: the variances of their logarithms add up."""
    value = over.value / under.value
    half, other_half = over.log_half_width, under.log_half_width
    if half is None or other_half is None:
        return Estimate(value=value, reason=over.reason or under.reason)
    return _around(value, math.hypot(half, other_half))


def _around(value: float, log_half_width: float) -> Estimate:
    factor = math.exp(log_half_width)
    return Estimate(value=value, low=value / factor, high=value * factor)


def pooled_rate(runs: Sequence[Run]) -> Estimate:
    """Returns tokens or images per second over all devices, of the launches of one configuration.

    The interval of one launch covers its steps only, not other launches. Several launches have the
    interval of `split_variance`.

    Raises ValueError for runs of several configs, and a run without a steady state.
    """
    configs = {without_length(run.config) for run in runs}
    if len(configs) != 1:
        raise ValueError(f"runs have {len(configs)} configs; give the launches of one")
    metrics, *_ = [steady_metrics(run) for run in runs]  # every run must have a steady state
    if len(runs) == 1:
        return Estimate(
            value=metrics.units_per_s,
            low=metrics.low_units_per_s,
            high=metrics.high_units_per_s,
            reason=metrics.step.reason,
        )
    per_step = runs[0].units_per_step
    variance = split_variance([run.launch for run in runs])
    if variance.median is None or variance.low is None or variance.high is None:
        return Estimate(value=per_step / median(variance.medians), reason=variance.reason)
    return Estimate(
        value=per_step / variance.median, low=per_step / variance.high, high=per_step / variance.low
    )


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """How much launches of one config differ, pooled over configs of one model on one machine kind.

    Two launches alone have one degree of freedom: their interval is 13 standard errors wide to
    either side.
    """

    deviation: float  # standard deviation of the logarithm of a launch's median step
    freedom: int  # launches minus configs

    def around(self, value: float, launches: int) -> Estimate:
        error = self.deviation / math.sqrt(launches)
        return _around(value, t_quantile((1 + CONFIDENCE) / 2, self.freedom) * error)


ModelOnMachine = tuple[ModelConfig, str]  # the model, and the processors it ran on


def find_scatters(runs: Iterable[Run]) -> dict[ModelOnMachine, Scatter]:
    """Returns the scatter of each model and kind of processors with enough repeated launches."""
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


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """The launches of one config, and their pooled rate."""

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
        """The launch with the median rate; of two, the slower one."""
        in_order = sorted(self.runs, key=lambda run: (run.units_per_s or 0.0, run.name))
        return in_order[(len(in_order) - 1) // 2]


def drift(points: Iterable[MeasuredPoint]) -> float | None:
    """Returns how much the machine itself differed between the jobs of these points.

    That is the highest ceiling that any rank measured over the lowest, minus 1; None if a rank
    measured none.
    """
    ceilings = [c for point in points for run in point.runs for c in run.record["ceiling"]]
    if not ceilings or None in ceilings:
        return None
    speeds = [ceiling["matmul_flops_per_s"] for ceiling in ceilings]
    return float(max(speeds) / min(speeds)) - 1


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One config over two or more device counts."""

    scaling: Scaling  # strong: the same global batch; weak: the same batch per device
    strategy: str
    points: tuple[MeasuredPoint, ...]  # by device count
    remarks: tuple[str, ...]  # how the points were chosen

    @property
    def baseline(self) -> MeasuredPoint:
        """The smallest device count, which need not be 1."""
        return self.points[0]

    @functools.cached_property
    def differing_conditions(self) -> tuple[str, ...]:
        """The conditions in which the records differ; record numbers follow the points."""
        return tuple(differences([run.record for point in self.points for run in point.runs]))

    def speedup(self, point: MeasuredPoint) -> Estimate:
        if point is self.baseline:
            return Estimate(value=1.0, reason="the baseline itself")
        return ratio(point.rate, self.baseline.rate)

    def efficiency(self, point: MeasuredPoint) -> Estimate:
        """Returns the rate per device over that of the baseline.

        On a weak curve, this is the baseline's step time over that of the point.
        """
        return self.speedup(point).times(self.baseline.devices / point.devices)

    @functools.cached_property
    def threads(self) -> tuple[int, ...] | None:
        """Threads per rank at each point, if the ranks of a CPU share its cores; otherwise None."""
        threads: list[int] = []
        for point in self.points:
            ranks = [host for run in point.runs for host in run.record["hardware"]]
            counts = {host.get("threads") for host in ranks}
            if {host["device"] for host in ranks} != {"cpu"} or len(counts) > 1 or None in counts:
                return None
            threads += counts
        is_split = len(set(threads)) > 1 and threads == sorted(threads, reverse=True)
        return tuple(threads) if is_split else None

    def drift(self, point: MeasuredPoint) -> float | None:
        """Returns the machine's drift since the baseline.

        None also if the number of threads per rank changed, since that changes the ceilings.
        """
        return None if self.threads is not None else drift([self.baseline, point])

    def ideal(self, point: MeasuredPoint) -> float:
        """Returns the efficiency without loss: 1, or the remaining share of a rank's cores."""
        if self.threads is None:
            return 1.0
        return self.threads[self.points.index(point)] / self.threads[0]


def find_curves(
    runs: Iterable[Run], scatters: Mapping[ModelOnMachine, Scatter] | None = None
) -> list[Curve]:
    """Returns every strong and weak curve of at least two device counts.

    The runs of a curve are equal except for `devices` and `num_nodes`; on a strong curve, the
    division of the global batch may differ too. Each kind of processors has separate curves. If all
    runs of a strategy have several devices, `single` is its baseline. Runs that failed or have no
    steady state are left out.
    """
    usable = sorted(
        (run for run in runs if run.is_ok and run.metrics is not None), key=lambda run: run.name
    )
    scatters = find_scatters(usable) if scatters is None else scatters
    curves = []
    for scaling in get_args(Scaling):
        groups: dict[tuple[Any, ...], list[Run]] = {}
        for run in usable:
            key = (*_shared(run.config, scaling), run.processors)
            groups.setdefault(key, []).append(run)
        counts = {key: {r.config.parallel.world_size for r in groups[key]} for key in groups}
        for key in sorted((key for key in groups if len(counts[key]) >= LEAST_COUNTS), key=repr):
            names = {run.config.parallel.strategy for run in groups[key]} - {"single"}
            curves += [_curve(scaling, name, groups[key], scatters) for name in sorted(names)]
    return [curve for curve in curves if len(curve.points) >= LEAST_COUNTS]


def _shared(config: RunConfig, scaling: Scaling) -> tuple[Any, ...]:
    """Returns what all runs of a curve share, whatever their strategy, with the batch."""
    parallel = vars(config.parallel) | {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    shared = vars(config) | {"parallel": tuple(parallel.values())}
    if scaling == "weak":
        return (*shared.values(), config.batch_size * config.accumulate)
    return (*(shared | {"batch_size": 1, "accumulate": 1}).values(), config.global_batch_size)


def pool(
    runs: Iterable[Run],
    scatters: Mapping[ModelOnMachine, Scatter] | None = None,
    shared: Callable[[RunConfig], RunConfig] = lambda config: config,
) -> list[MeasuredPoint]:
    """Returns a point for each config on each kind of processors.

    With fewer than `ENOUGH_LAUNCHES`, the interval comes from the scatter of the model, if any;
    `scatters` are by default those of these runs.

    Args:
        shared: what the launches of a point share of their configs; by default everything.
    """
    runs = list(runs)
    scatters = find_scatters(runs) if scatters is None else scatters
    groups: dict[tuple[RunConfig, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((shared(run.config), run.processors), []).append(run)
    points = []
    for (config, processors), launches in groups.items():
        rate, scatter = pooled_rate(launches), scatters.get((config.model, processors))
        is_pooled = scatter is not None and len(launches) < ENOUGH_LAUNCHES
        if scatter is not None and is_pooled:
            rate = scatter.around(rate.value, len(launches))
        points.append(MeasuredPoint(runs=tuple(launches), rate=rate, is_pooled=is_pooled))
    return points


def _curve(
    scaling: Scaling,
    strategy: str,
    group: Sequence[Run],
    scatters: Mapping[ModelOnMachine, Scatter],
) -> Curve:
    runs = [run for run in group if run.config.parallel.strategy == strategy]
    single = [run for run in group if run.config.parallel.strategy == "single"]
    remarks = []
    if single and all(run.config.parallel.world_size > 1 for run in runs):
        runs += single
        remarks.append(f"1 device is strategy single: {strategy} was not measured on one")
    counts: dict[int, list[MeasuredPoint]] = {}
    for point in pool(runs, scatters):
        counts.setdefault(point.devices, []).append(point)
    points = []
    for devices, splits in sorted(counts.items()):
        fastest = max(splits, key=lambda point: point.rate.value)
        points.append(fastest)
        if len(splits) > 1:
            config, parallel = fastest.config, fastest.config.parallel
            nodes = f"{parallel.num_nodes} nodes x " if parallel.num_nodes > 1 else ""
            remarks.append(
                f"{devices} devices: the fastest of {len(splits)} batch splits is shown, "
                f"{config.batch_size} per device x {config.accumulate} micro-batches x "
                f"{nodes}{parallel.devices} devices"
            )
    return Curve(scaling=scaling, strategy=strategy, points=tuple(points), remarks=tuple(remarks))
