"""Computes the median of a series of samples and its interval, by a block bootstrap.

Step times are autocorrelated: a slow step has slow neighbors, hence blocks. The interval depends on
nothing but the samples: the seed is a constant.
"""

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy is slow to import, and a login node may lack it
    from unitransformer.stats.autocorrelation import Ints

CONFIDENCE = 0.95
MIN_SAMPLES = 50  # the coverage test holds from here on
MIN_BLOCKS = 5  # with fewer all resamples are alike
RESAMPLES = 2000
SEED = 20041


@dataclass(frozen=True, kw_only=True)
class MedianInterval:
    """Median, spread and interval of the median, in the unit of the samples.

    `low` and `high` are None together, and `reason` says why. `block_length` is None with them, and
    also where the interval was read from a record, which does not hold it.
    """

    median: float
    mad: float  # median absolute deviation from the median, not scaled
    count: int
    low: float | None
    high: float | None
    block_length: int | None  # samples in one block of the bootstrap
    confidence: float = CONFIDENCE
    reason: str | None = None

    @property
    def relative_width(self) -> float | None:
        """The width of the interval as a share of the median."""
        if self.low is None or self.high is None or not self.median:
            return None
        return (self.high - self.low) / abs(self.median)


def describe(samples: Sequence[float], *, confidence: float = CONFIDENCE) -> MedianInterval:
    """Returns median, median absolute deviation, count, and the interval of the median.

    The interval is the percentile interval of a circular block bootstrap (Politis & Romano 1992)
    with two corrections, because the plain one covers 83 to 92 % instead of 95 % (AR(1) of 0.5, 50
    to 400 samples). First, blocks are twice as long as `block_length` says: that rule minimizes the
    error of a variance, and an interval needs longer blocks (Lazarus, Lewis, Stock & Watson 2018,
    "HAR inference: recommendations for practice"). Second, the percentiles move outwards for the
    number of blocks (Hesterberg 2015, "What teachers should know about the bootstrap", expanded
    percentile interval).

    The interval covers the median of 93 to 97 % of lognormal AR(1) series with coefficients of 0 to
    0.5 and 5 % spikes, from `MIN_SAMPLES` on. With 0.8 that takes 200 samples: 100 cover 92 %, and
    50 cover 84 % where they are not refused. Raises ValueError without samples, for one that is not
    finite, and for a confidence outside (0, 1).
    """
    if not samples:
        raise ValueError("samples is empty; a median needs at least one")
    for index, sample in enumerate(samples):
        if not math.isfinite(sample):
            raise ValueError(f"samples[{index}] is {sample}; give finite numbers only")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a share between 0 and 1, such as 0.95")
    block, reason = find_block(samples)
    low, high = (None, None) if block is None else _percentiles(samples, block, confidence)
    median = statistics.median(samples)
    return MedianInterval(
        median=median,
        mad=statistics.median(abs(sample - median) for sample in samples),
        count=len(samples),
        low=low,
        high=high,
        block_length=block,
        confidence=confidence,
        reason=reason,
    )


def mean_rate(step_s: Sequence[float], per_step: float, *, between_steps_s: float = 0.0) -> float:
    """Returns units per second from totals, which include the stalls that a median hides."""
    if not step_s or min(step_s) <= 0:
        raise ValueError("step_s holds no steps, or one that took no time; measure again")
    return per_step * len(step_s) / (math.fsum(step_s) + between_steps_s)


def find_block(samples: Sequence[float]) -> tuple[int | None, str | None]:
    """Returns the block length of the bootstrap, or why there is no interval."""
    if len(samples) < MIN_SAMPLES:
        return None, f"{len(samples)} samples, an interval needs {MIN_SAMPLES}"
    from unitransformer.stats.autocorrelation import block_length

    block = 2 * block_length(samples)
    if len(samples) < MIN_BLOCKS * block:
        return None, f"autocorrelated over {block} steps; needs {MIN_BLOCKS * block} samples"
    return block, None


def _percentiles(samples: Sequence[float], block: int, confidence: float) -> tuple[float, float]:
    """Returns both ends of the interval, without building or sorting a resample.

    The median of a resample is at most t if at least half of its values are. Bisection over t finds
    a percentile of the medians from such counts; the count of a block is a difference of running
    totals. 10,000 samples take a fraction of a second.
    """
    import numpy as np

    values = np.asarray(samples, dtype=np.float64)
    in_order, twice = np.sort(values), np.concatenate([values, values])
    count = len(values)
    whole, last = _draw_blocks(count, block)
    rest = count - block * len(whole)  # length of the last block

    @cache  # four bisections have most of their bounds in common
    def count_upto(bound: float) -> "Ints":
        """Returns, for each resample, how many of its values are at most `bound`."""
        totals = np.concatenate([[0], np.cumsum(twice <= bound)]).astype(np.int32)
        in_block = totals[block : block + count] - totals[:count]
        in_last = totals[rest : rest + count] - totals[:count]
        counts: Ints = in_block[whole].sum(axis=0, dtype=np.int32) + in_last[last]
        return counts

    def percentile(level: float, index: int) -> float:
        """Returns a percentile, over resamples, of the value at `index` of the sorted resample."""

        def share(bound: float) -> float:
            return np.count_nonzero(count_upto(bound) > index) / RESAMPLES

        return float(in_order[bisect_left(in_order, level, hi=count - 1, key=share)])

    tail = _tail(count / block, confidence)
    middles = ((count - 1) // 2, count // 2)  # their mean is the median
    low, high = (sum(percentile(p, index) for index in middles) / 2 for p in (tail, 1 - tail))
    return low, high


@lru_cache(maxsize=16)
def _draw_blocks(count: int, block: int) -> tuple["Ints", "Ints"]:
    """Returns where the blocks of `RESAMPLES` resamples of `count` values start.

    Shapes: whole blocks (block, resample), and the last, shorter one (resample,).
    """
    import numpy as np

    starts = np.random.default_rng(SEED).integers(0, count, (RESAMPLES, math.ceil(count / block)))
    return np.ascontiguousarray(starts[:, :-1].T), np.ascontiguousarray(starts[:, -1])


@lru_cache(maxsize=256)
def _tail(num_blocks: float, confidence: float) -> float:
    """Returns the share of resamples beyond each end: Hesterberg's, for independent blocks."""
    scale = math.sqrt(num_blocks / (num_blocks - 1))
    return NormalDist().cdf(-scale * t_quantile((1 + confidence) / 2, num_blocks - 1))


@lru_cache(maxsize=256)
def t_quantile(level: float, freedom: float) -> float:
    """Returns the quantile of Student's t at a level of at least a half.

    With t = sqrt(freedom) tan(x) the density becomes a power of cos(x), which Simpson's rule
    integrates to ten digits.
    """
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = math.exp(log_scale) / math.sqrt(math.pi)

    def share(angle: float) -> float:
        step = angle / 100
        powers = [math.pow(math.cos(step * place), freedom - 1) for place in range(101)]
        inner = 4 * sum(powers[1:-1:2]) + 2 * sum(powers[2:-1:2])
        return 0.5 + scale * (powers[0] + inner + powers[-1]) * step / 3

    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if share(middle) >= level else (middle, high)
    return math.sqrt(freedom) * math.tan(high)
