"""Median ratios of paired measurements, with intervals that assume no distribution."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from unitransformer.stats.comparisons import split_variance
from unitransformer.stats.intervals import MedianInterval
from unitransformer.stats.ranks import interval_rank

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median of paired ratios; `low` and `high` are None with too few pairs for an interval."""

    median: float
    low: float | None
    high: float | None
    pairs: int


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Returns the median ratio of pairs and its 95 % interval from order statistics.

    With fewer than 6 pairs there is no interval. Pairs are measured in random order one after the
    other, so that slow changes of the machine cancel in each. The interval covers other pairs of
    the same two processes, not other launches: see `pool_launches`.

    Raises:
        ValueError: no pairs, a different number of each, or one that is not above 0.
    """
    if not 0 < len(numerators) == len(denominators):
        raise ValueError(f"{len(numerators)} and {len(denominators)} samples are not pairs")
    if min(*numerators, *denominators) <= 0:
        raise ValueError("a sample is not above 0; measure again")
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    rank = interval_rank(len(ratios), CONFIDENCE)
    return Ratio(
        median=math.exp(statistics.median(map(math.log, ratios))),
        low=None if rank is None else ratios[rank - 1],
        high=None if rank is None else ratios[-rank],
        pairs=len(ratios),
    )


def pool_launches(launches: Sequence[Ratio]) -> Ratio:
    """Returns the median ratio over launches, with the 95 % interval of `split_variance`.

    Launches differ by more than their pairs say, since each has its own memory layout. One launch
    keeps the interval of its pairs. Several have no interval if one of them has none.

    Raises:
        ValueError: no launches.
    """
    if not launches:
        raise ValueError("launches is empty; give at least one")
    if len(launches) == 1:
        return launches[0]
    found = split_variance([_as_launch(ratio) for ratio in launches])
    return Ratio(
        median=statistics.geometric_mean(found.medians) if found.median is None else found.median,
        low=found.low,
        high=found.high,
        pairs=sum(ratio.pairs for ratio in launches),
    )


def _as_launch(ratio: Ratio) -> MedianInterval:
    has_interval = ratio.low is not None
    return MedianInterval(
        median=ratio.median,
        mad=math.nan,  # plays no part
        count=ratio.pairs,
        low=ratio.low,
        high=ratio.high,
        block_length=1 if has_interval else None,  # pairs are independent within a launch
        reason=None if has_interval else "too few pairs",
    )
