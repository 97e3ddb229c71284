"""Finds which ordered samples enclose the median, without assuming a distribution."""

import math
from functools import lru_cache


@lru_cache(maxsize=256)
def interval_rank(count: int, confidence: float) -> int | None:
    """Returns the largest k for which the k-th smallest and the k-th largest enclose the median.

    They do with probability 1 - 2 P(Binomial(count, 1/2) < k) (David & Nagaraja 2003, Order
    Statistics, section 7.1). None if no k reaches the confidence.
    """
    below, rank = 0.0, None
    for k in range(1, count // 2 + 1):
        below += math.comb(count, k - 1) / 2**count
        if 1 - 2 * below < confidence:
            break
        rank = k
    return rank
