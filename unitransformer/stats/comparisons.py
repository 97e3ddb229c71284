"""Compares two series of samples, or several launches of the same run."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from unitransformer.stats.intervals import CONFIDENCE, MedianInterval, describe, t_quantile

MIN_LAUNCHES = 2


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> MedianInterval:
    """Returns median, spread and interval of b / a over pairs; above 1, b is larger.

    The samples of a pair are taken one right after the other, so that what slows both cancels.
    Median and interval are exponentials of those of the logarithms, so the ratio of a to b is the
    inverse. `mad` is a factor less 1 (0.02: half of the pairs are within 2 % of the median ratio).

    Raises:
        ValueError: the series differ in length, or a sample is not above 0.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} samples and b {len(b)}; a pair needs one of each")
    for name, samples in (("a", a), ("b", b)):
        for index, sample in enumerate(samples):
            if not 0 < sample < math.inf:
                raise ValueError(
                    f"{name}[{index}] is {sample}; a ratio needs finite values above 0"
                )
    logs = describe([math.log(after / before) for before, after in zip(a, b, strict=True)])
    return replace(
        logs,
        median=math.exp(logs.median),
        mad=math.expm1(logs.mad),
        low=None if logs.low is None else math.exp(logs.low),
        high=None if logs.high is None else math.exp(logs.high),
    )


def minimum_detectable_effect(ratio: MedianInterval, *, power: float = 0.95) -> float | None:
    """Returns the smallest slowdown (0.02: 2 %) that such pairs would detect with that power.

    Detected means that the whole interval of the ratio lies above 1. The two normal quantiles add
    up (Cohen 1988, "Statistical power analysis", chapter 2); half of the interval, in logarithms,
    is the first of them. None without an interval.
    """
    if not 0.5 <= power < 1:
        raise ValueError(f"power is {power}; give a share from 0.5 to below 1, such as 0.95")
    if ratio.low is None or ratio.high is None:
        return None
    half = math.log(ratio.high / ratio.low) / 2
    normal = NormalDist()
    return math.expm1(half * (1 + normal.inv_cdf(power) / normal.inv_cdf((1 + CONFIDENCE) / 2)))


@dataclass(frozen=True, kw_only=True)
class LaunchVariance:
    """How much repeated launches of a run scatter, and why.

    Deviations are those of the logarithm of the seconds: 0.01 is 1 %. `within` and the later fields
    are None together, and `reason` says why.
    """

    medians: tuple[float, ...]  # of each launch, in the unit of the samples
    within: float | None  # deviation of a launch's median, because its steps differ
    between: float | None  # deviation of the launches beyond that
    median: float | None  # over the launches
    low: float | None
    high: float | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class LaunchMedian:
    """The median of the steady steps of one launch and its interval, in seconds.

    `low`, `high` and `num_blocks` are None together, and `reason` says why.
    """

    median: float
    low: float | None
    high: float | None
    num_blocks: float | None  # in a resample of the bootstrap
    reason: str | None = None


def describe_launch(steps: Sequence[float]) -> LaunchMedian:
    """Raises ValueError if there are no steps, or one took no time."""
    if not steps or min(steps) <= 0:
        raise ValueError("a launch holds no steps or one that took no time")
    interval = describe(steps)
    return launch_of(interval, interval.block_length)


def launch_of(interval: MedianInterval, block_length: int | None) -> LaunchMedian:
    """Args: interval: of the seconds of the steady steps."""
    return LaunchMedian(
        median=interval.median,
        low=interval.low,
        high=interval.high,
        num_blocks=None if block_length is None else interval.count / block_length,
        reason=interval.reason,
    )


def split_variance(launches: Sequence[LaunchMedian]) -> LaunchVariance:
    """Splits the variance within and between launches; returns the interval over launches.

    The model is one-way random effects on the logarithm of each launch's median. The variance
    within comes from the block bootstrap of each launch, which allows for autocorrelated steps. The
    variance between is the moment estimate of DerSimonian & Laird 1986: 0 where the steps alone
    explain the scatter. The interval is that of Hartung & Knapp 2001 and Sidik & Jonkman 2002, from
    Student's t with one degree of freedom less than launches, never narrower than the variance
    within implies (Roever, Knapp & Friede 2015). With two launches it is wide.

    Raises:
        ValueError: there are fewer than two launches.
    """
    if len(launches) < MIN_LAUNCHES:
        raise ValueError(f"launches holds {len(launches)}; repeat the launch at least once")
    medians = tuple(launch.median for launch in launches)
    for number, launch in enumerate(launches, start=1):
        if launch.reason is not None:
            return _no_split(medians, f"launch {number}: {launch.reason}")
    variances = [_variance(launch) for launch in launches]
    if not all(variances):
        return _no_split(medians, "the steps of a launch all take the same time")
    return _split(medians, variances)


def _no_split(medians: tuple[float, ...], reason: str) -> LaunchVariance:
    nothing = dict.fromkeys(("within", "between", "median", "low", "high"))
    return LaunchVariance(medians=medians, **nothing, reason=reason)


def _variance(launch: LaunchMedian) -> float:
    """Returns the variance of the logarithm of a median, from the width of its interval.

    The interval is as wide as that of Student's t for as many samples as blocks (see `describe`).
    """
    assert launch.low is not None
    assert launch.high is not None
    assert launch.num_blocks is not None
    half = math.log(launch.high / launch.low) / 2
    return (half / t_quantile((1 + CONFIDENCE) / 2, launch.num_blocks - 1)) ** 2


def _split(medians: tuple[float, ...], variances: Sequence[float]) -> LaunchVariance:
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


def _weighted_scatter(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Returns the weighted mean, and the weighted sum of squared distances from it."""
    pairs = list(zip(values, weights, strict=True))
    mean = sum(value * weight for value, weight in pairs) / sum(weights)
    return mean, sum(weight * (value - mean) ** 2 for value, weight in pairs)


def pays_off_at(compile_s: float, eager_step_s: float, compiled_step_s: float) -> int | None:
    """Returns the steps after which a compiled run has caught up with an eager one; None if never.

    It is the smallest n with compile_s + n * compiled_step_s <= n * eager_step_s.

    Raises:
        ValueError: a time is negative or not finite.
    """
    times = {"compile_s": compile_s, "eager_step_s": eager_step_s}
    for name, seconds in {**times, "compiled_step_s": compiled_step_s}.items():
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"{name} is {seconds}; give seconds, 0 or more")
    saved_s = eager_step_s - compiled_step_s
    if saved_s <= 0:
        return None
    return math.ceil(compile_s / saved_s * (1 - 1e-12))  # 3 / (0.3 - 0.2) is a hair above 30
