"""Compares the medians of several launches of a run, and a compiled run with an eager one."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from unitransformer.stats.intervals import CONFIDENCE, MedianInterval, describe, t_quantile

MIN_LAUNCHES = 2


@dataclass(frozen=True, kw_only=True)
class LaunchVariance:
    """How much repeated launches of a run scatter, and why.

    Deviations are those of the logarithm of the seconds: 0.01 is 1 %. `within` and the later fields
    are None together, and `reason` says why.
    """

    medians: tuple[float, ...]  # of each launch, in the unit of the samples
    within: float | None = None  # deviation of a launch's median, because its steps differ
    between: float | None = None  # deviation of the launches beyond that
    median: float | None = None  # over the launches
    low: float | None = None
    high: float | None = None
    reason: str | None = None


def describe_launch(steps: Sequence[float]) -> MedianInterval:
    """Describes the steady steps of a launch; raises ValueError for none, or one without time."""
    if not steps or min(steps) <= 0:
        raise ValueError("a launch holds no steps or one that took no time")
    return describe(steps)


def split_variance(launches: Sequence[MedianInterval]) -> LaunchVariance:
    """Splits the variance within and between launches; returns the interval over launches.

    The model is one-way random effects on the logarithm of each launch's median. The variance
    within comes from the block bootstrap of each launch, which allows for autocorrelated steps. The
    variance between is the moment estimate of DerSimonian & Laird 1986: 0 where the steps alone
    explain the scatter. The interval is that of Hartung & Knapp 2001 and Sidik & Jonkman 2002, from
    Student's t with one degree of freedom less than launches, never narrower than the variance
    within implies (Roever, Knapp & Friede 2015). With two launches it is wide; fewer raise
    ValueError.
    """
    if len(launches) < MIN_LAUNCHES:
        raise ValueError(f"launches holds {len(launches)}; repeat the launch at least once")
    medians = tuple(launch.median for launch in launches)
    for number, launch in enumerate(launches, start=1):
        if launch.reason is not None:
            return LaunchVariance(medians=medians, reason=f"launch {number}: {launch.reason}")
    variances = [_variance(launch) for launch in launches]
    if not all(variances):
        reason = "the steps of a launch all take the same time"
        return LaunchVariance(medians=medians, reason=reason)
    logs = [math.log(median) for median in medians]
    freedom = len(logs) - 1
    # DerSimonian & Laird 1986, equation 8.
    weights = [1 / variance for variance in variances]
    _, scatter = _weighted_scatter(logs, weights)
    scale = sum(weights) - sum(weight**2 for weight in weights) / sum(weights)
    between = max(0.0, (scatter - freedom) / scale)

    weights = [1 / (variance + between) for variance in variances]
    center, scatter = _weighted_scatter(logs, weights)
    error = math.sqrt(max(1.0, scatter / freedom) / sum(weights))
    half = t_quantile((1 + CONFIDENCE) / 2, freedom) * error
    return LaunchVariance(
        medians=medians,
        within=math.sqrt(statistics.fmean(variances)),
        between=math.sqrt(between),
        median=math.exp(center),
        low=math.exp(center - half),
        high=math.exp(center + half),
    )


def _variance(launch: MedianInterval) -> float:
    """Returns the variance of the logarithm of a median, from the width of its interval.

    The interval is as wide as that of Student's t for as many samples as blocks (see `describe`).
    """
    assert launch.low is not None
    assert launch.high is not None
    assert launch.block_length is not None
    half = math.log(launch.high / launch.low) / 2
    freedom = launch.count / launch.block_length - 1
    return (half / t_quantile((1 + CONFIDENCE) / 2, freedom)) ** 2


def _weighted_scatter(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Returns the weighted mean, and the weighted sum of squared distances from it."""
    pairs = list(zip(values, weights, strict=True))
    mean = sum(value * weight for value, weight in pairs) / sum(weights)
    return mean, sum(weight * (value - mean) ** 2 for value, weight in pairs)


def pays_off_at(compile_s: float, eager_step_s: float, compiled_step_s: float) -> int | None:
    """Returns the steps after which a compiled run has caught up with an eager one; None if never.

    It is the smallest n with compile_s + n * compiled_step_s <= n * eager_step_s. Raises ValueError
    for a time that is negative or not finite.
    """
    times = {"compile_s": compile_s, "eager_step_s": eager_step_s}
    for name, seconds in {**times, "compiled_step_s": compiled_step_s}.items():
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"{name} is {seconds}; give seconds, 0 or more")
    saved_s = eager_step_s - compiled_step_s
    if saved_s <= 0:
        return None
    return math.ceil(compile_s / saved_s * (1 - 1e-12))  # 3 / (0.3 - 0.2) is a hair above 30
