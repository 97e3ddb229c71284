"""Raw seconds of steps in, the figures people read out. Plain arithmetic."""

import statistics
from collections.abc import Sequence

LEAST_STEPS = 8  # fewer cannot show where steady begins


def slowest(step_s_of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each step on the rank that took longest: the others wait for it.

    Raises:
        ValueError: ranks that disagree on the number of steps.
    """
    return [max(step) for step in zip(*step_s_of_ranks, strict=True)]


def steady_start(step_s: Sequence[float]) -> int | None:
    """First step of the steady state, None if the run is too short to tell.

    MSER (White 1997): the cut, within the first half, after which the mean is known best: least
    variance over the square of the number of steps left.
    """
    if len(step_s) < LEAST_STEPS:
        return None

    def uncertainty(cut: int) -> float:
        kept = step_s[cut:]
        return statistics.pvariance(kept) / len(kept)

    return min(range(len(step_s) // 2 + 1), key=uncertainty)


def rate_per_s(step_s: Sequence[float], steady_from: int | None, per_step: float) -> float | None:
    """Units a second at the median steady step; None without a steady state."""
    if steady_from is None:
        return None
    return per_step / statistics.median(step_s[steady_from:])
