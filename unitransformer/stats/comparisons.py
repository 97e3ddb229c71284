"""Two series of samples, or several launches of one, in; how far they are apart out."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from unitransformer.stats.intervals import CONFIDENCE, MedianInterval, describe, t_quantile

MIN_LAUNCHES = 2


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> MedianInterval:
    """b over a, pair by pair: median, spread and interval of the ratio; above 1, b is larger.

    Pairs are samples taken one right after the other, so that what slows both cancels. The
    figures are those of the logarithms, taken back: the ratio of a to b is the inverse, and
    `mad` is a factor less 1 (0.02: half of the pairs are within 2 % of the median ratio).

    Raises:
        ValueError: series of different lengths, a sample that is not above 0.
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
    """The least slowdown, as a share (0.02: 2 %), that such pairs would find with that power.

    Found: the interval of the ratio lies above 1 as a whole. The two normal quantiles add up
    (Cohen 1988, "Statistical power analysis", chapter 2); the half of the interval, in
    logarithms, is the first of them. None without an interval.
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
    """Where the scatter of repeated launches comes from.

    Deviations are relative: of the logarithm of the seconds, 0.01 is 1 %. `within` and later fields
    are None together, and `reason` says why.
    """

    medians: tuple[float, ...]  # of each launch, in the unit of the samples
    within: float | None  # of a launch's median, because its steps differ
    between: float | None  # of launches, beyond what their steps explain
    median: float | None  # over the launches
    low: float | None
    high: float | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class LaunchMedian:
    """The median of a launch's steady steps and its interval, in seconds.

    `low`, `high` and `num_blocks` are None together, and `reason` says why.
    """

    median: float
    low: float | None
    high: float | None
    num_blocks: float | None  # that the bootstrap of the interval drew
    reason: str | None = None


def describe_launch(steps: Sequence[float]) -> LaunchMedian:
    """Raises ValueError for no steps, or one that took no time."""
    if not steps or min(steps) <= 0:
        raise ValueError("a launch holds no steps or one that took no time")
    figures = describe(steps)
    return launch_of(figures, figures.block_length)


def launch_of(figures: MedianInterval, block_length: int | None) -> LaunchMedian:
    """Args: figures: of the seconds of its steady steps."""
    return LaunchMedian(
        median=figures.median,
        low=figures.low,
        high=figures.high,
        num_blocks=None if block_length is None else figures.count / block_length,
        reason=figures.reason,
    )


def split_variance(launches: Sequence[LaunchMedian]) -> LaunchVariance:
    """Variance within and between launches apart, and the interval of the median over launches.

    One-way random effects on the logarithm of each launch's median. Its variance within comes
    from the launch's block bootstrap, which takes care of steps that follow one another: the
    percentiles of a logarithm are the logarithms of the percentiles. The
    variance between is the moment estimate of DerSimonian & Laird 1986, 0 where the steps alone
    explain the scatter. The interval is that of Hartung & Knapp 2001 and Sidik & Jonkman 2002, with
    Student's t of one less than the launches, never narrower than what the steps alone leave open
    (Roever, Knapp & Friede 2015): with two launches it is wide, because two tell little.

    Args:
        launches: each as `describe_launch` tells it.

    Raises:
        ValueError: fewer than two launches.
    """
    if len(launches) < MIN_LAUNCHES:
        raise ValueError(f"launches holds {len(launches)}; repeat the launch at least once")
    medians = tuple(launch.median for launch in launches)
    for number, launch in enumerate(launches):
        if launch.reason is not None:
            return _untold(medians, f"launch {number + 1}: {launch.reason}")
    variances = [_variance(launch) for launch in launches]
    if not all(variances):
        return _untold(medians, "a launch whose steps take the same time leaves nothing to split")
    return _split(medians, variances)


def _untold(medians: tuple[float, ...], reason: str) -> LaunchVariance:
    nothing = dict.fromkeys(("within", "between", "median", "low", "high"))
    return LaunchVariance(medians=medians, **nothing, reason=reason)


def _variance(launch: LaunchMedian) -> float:
    """Of the logarithm of the median, from the width of its interval."""
    assert launch.low is not None
    assert launch.high is not None
    assert launch.num_blocks is not None
    # The interval is as wide as Student's t for that many blocks (see `describe`).
    half = math.log(launch.high / launch.low) / 2
    return (half / t_quantile((1 + CONFIDENCE) / 2, launch.num_blocks - 1)) ** 2


def _split(medians: tuple[float, ...], variances: Sequence[float]) -> LaunchVariance:
    logs = [math.log(median) for median in medians]
    between = _between(logs, variances)
    weights = [1 / (variance + between) for variance in variances]
    centre = _mean(logs, weights)
    freedom = len(logs) - 1
    scatter = sum(weight * (log - centre) ** 2 for log, weight in zip(logs, weights, strict=True))
    error = math.sqrt(max(1.0, scatter / freedom) / sum(weights))
    half = t_quantile((1 + CONFIDENCE) / 2, freedom) * error
    return LaunchVariance(
        medians=medians,
        within=math.sqrt(statistics.fmean(variances)),
        between=math.sqrt(between),
        median=math.exp(centre),
        low=math.exp(centre - half),
        high=math.exp(centre + half),
    )


def _between(logs: Sequence[float], variances: Sequence[float]) -> float:
    """DerSimonian & Laird 1986, equation 8."""
    weights = [1 / variance for variance in variances]
    centre = _mean(logs, weights)
    scatter = sum(weight * (log - centre) ** 2 for log, weight in zip(logs, weights, strict=True))
    total = sum(weights)
    scale = total - sum(weight**2 for weight in weights) / total
    return max(0.0, (scatter - (len(logs) - 1)) / scale)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    pairs = zip(values, weights, strict=True)
    return sum(value * weight for value, weight in pairs) / sum(weights)


def pays_off_at(compile_s: float, eager_step_s: float, compiled_step_s: float) -> int | None:
    """Steps after which a compiled run has caught up with an eager one; None if it never does.

    The smallest n with compile_s + n * compiled_step_s <= n * eager_step_s.

    Raises:
        ValueError: a time that is negative or not finite.
    """
    times = {"compile_s": compile_s, "eager_step_s": eager_step_s}
    for name, seconds in {**times, "compiled_step_s": compiled_step_s}.items():
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"{name} is {seconds}; give seconds, 0 or more")
    saved_s = eager_step_s - compiled_step_s
    if saved_s <= 0:
        return None
    # 3 / (0.3 - 0.2) is a hair above 30.
    return math.ceil(compile_s / saved_s * (1 - 1e-12))
