"""Samples of one quantity in, in the order they were taken; what they say of its median out.

Step times follow one another: a slow step has slow neighbours. Every interval here is a block
bootstrap's for that reason, and depends on nothing but the samples: the seed is a constant.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

from unitransformer.stats.autocorrelation import block_length

if TYPE_CHECKING:  # numpy is slow to import, and a login node may have none
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.integer]

CONFIDENCE = 0.95
LEAST_SAMPLES = 50  # from here on the coverage test holds
LEAST_BLOCKS = 5  # with fewer the resamples are all alike
RESAMPLES = 2000
SEED = 20041


@dataclass(frozen=True, kw_only=True)
class MedianInterval:
    """Median, spread and interval of the median, in the unit of the samples.

    `low` and `high` are None together, and `reason` says why. `block_length` is None with them, and
    where the figures were read back from a record, which does not hold it.
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
        """The whole interval, from low to high, as a share of the median."""
        if self.low is None or self.high is None or not self.median:
            return None
        return (self.high - self.low) / abs(self.median)


def describe(samples: Sequence[float], *, confidence: float = CONFIDENCE) -> MedianInterval:
    """Median, median absolute deviation, count, and the bootstrap interval of the median.

    The interval is the percentile interval of a circular block bootstrap (Politis & Romano 1992),
    with two corrections, because the plain one covers 83 to 92 % where 95 % is promised (AR(1) of
    0.5, 50 to 400 samples). Blocks are twice as long as the rule of `block_length` says: that rule
    is for the least error of a variance, an interval wants longer ones (Lazarus, Lewis, Stock &
    Watson 2018, "HAR inference: recommendations for practice"). And the percentiles are moved
    outwards for the number of blocks (Hesterberg 2015, "What teachers should know about the
    bootstrap", expanded percentile interval).

    Covers 93 to 97 % of lognormal AR(1) series of 0 to 0.5 with 5 % spikes from `LEAST_SAMPLES` on.
    With a coefficient of 0.8 it does from 200 on; 100 cover 92 %, and 50 cover 84 %, where they are
    not refused.

    Raises:
        ValueError: no samples, one that is no finite number, a confidence outside (0, 1).
    """
    if not samples:
        raise ValueError("samples holds none; a median needs at least one")
    for index, sample in enumerate(samples):
        if not math.isfinite(sample):
            raise ValueError(f"samples[{index}] is {sample}; leave nothing but finite numbers")
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


def mean_rate(step_s: Sequence[float], per_step: float, *, between_s: float = 0.0) -> float:
    """Units a second out of totals, stalls and all: the median rate does not see those.

    Args:
        between_s: seconds that went by between the steps, all together.
    """
    if not step_s or min(step_s) <= 0:
        raise ValueError("step_s holds no steps, or one that took no time; measure again")
    return per_step * len(step_s) / (math.fsum(step_s) + between_s)


# ------------------------------------------------------------------------------ the bootstrap


def find_block(samples: Sequence[float]) -> tuple[int | None, str | None]:
    """Length of the blocks of the bootstrap, or why there is no interval."""
    count = len(samples)
    if count < LEAST_SAMPLES:
        return None, f"{count} samples, an interval needs {LEAST_SAMPLES}"
    block = 2 * block_length(samples)
    if count < LEAST_BLOCKS * block:
        return None, (
            f"{count} samples that hang together over {block} of them, an interval needs "
            f"{LEAST_BLOCKS * block}"
        )
    return block, None


def _percentiles(samples: Sequence[float], block: int, confidence: float) -> tuple[float, float]:
    """Interval of the median; of a percentile, the middle of two neighbours in an even number."""
    import numpy as np

    in_order = np.sort(np.asarray(samples, dtype=np.float64))
    ranks = np.searchsorted(in_order, samples, "right")
    ends = _places(ranks.tobytes(), block, confidence)
    low, high = ((float(in_order[left]) + float(in_order[right])) / 2 for left, right in ends)
    return low, high


@lru_cache(maxsize=4)  # logarithms are in the order of their numbers
def _places(
    of_ranks: bytes, block: int, confidence: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Places in the order of the samples of both ends of the interval, out of ranks alone.

    The median of a resample is at most t where at least half of its values are. So the percentile
    of the medians is found by bisection over t, counting values up to t from running totals: no
    resample is ever built or sorted, and 10,000 samples take a fraction of a second.
    """
    import numpy as np

    ranks = np.frombuffer(of_ranks, dtype=np.intp)
    count = len(ranks)
    whole, last = _drawn_blocks(count, block)
    rest = count - block * len(whole)
    in_order = np.sort(ranks)
    around = np.concatenate([ranks, ranks])
    totals = np.zeros(2 * count + 1, dtype=np.int32)

    @cache  # four bisections have most of their bounds in common
    def counts(place: int) -> "Ints":
        """Values of each resample that are at most the one at this place in their order."""
        np.cumsum(around <= in_order[place], out=totals[1:])
        of_whole = totals[block : block + count] - totals[:count]
        of_last = totals[rest : rest + count] - totals[:count]
        of_each = of_whole.take(whole, mode="clip")  # all are inside, and `clip` is not checked
        counted: Ints = np.add.reduce(of_each, axis=0, dtype=np.int32) + of_last[last]
        return counted

    def quantile(level: float, half: float) -> int:
        low, high = 0, count - 1
        while low < high:
            middle = (low + high) // 2
            if np.count_nonzero(counts(middle) > half) / RESAMPLES >= level:
                high = middle
            else:
                low = middle + 1
        return low

    tail = _tail(count / block, confidence)
    half = count / 2  # the median of an even number lies between two middle values
    low, high = ((quantile(level, half - 0.5), quantile(level, half)) for level in (tail, 1 - tail))
    return low, high


@lru_cache(maxsize=16)
def _drawn_blocks(count: int, block: int) -> tuple["Ints", "Ints"]:
    """First place of every whole block, and of the last, shorter one; shapes (block, resample) and
    (resample,). A resample has as many values as there are."""
    import numpy as np

    drawn = np.random.default_rng(SEED)
    starts = drawn.integers(0, count, (RESAMPLES, math.ceil(count / block)))
    return np.ascontiguousarray(starts[:, :-1].T), np.ascontiguousarray(starts[:, -1])


@lru_cache(maxsize=256)
def _tail(num_blocks: float, confidence: float) -> float:
    """Share of the resamples beyond each end: Hesterberg's, for that many independent values."""
    wide = math.sqrt(num_blocks / (num_blocks - 1)) * t_quantile(
        (1 + confidence) / 2, num_blocks - 1
    )
    return NormalDist().cdf(-wide)


@lru_cache(maxsize=256)
def t_quantile(level: float, freedom: float) -> float:
    """Student's t: the value that a share `level`, at least a half, stays below.

    With t = sqrt(freedom) tan(x) the density becomes a power of cos(x), which Simpson's rule adds
    up to ten digits.
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
