"""Median ratios of paired measurements, with intervals that assume no distribution."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

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
    other, so that slow changes of the machine cancel in each.

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
