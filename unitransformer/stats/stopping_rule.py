"""Decides whether the median step is known well enough to end a run."""

from collections.abc import Collection, Sequence

from unitransformer.stats.intervals import describe
from unitransformer.stats.steady_state import find_steady_state

FIRST_CHECK = 64  # steps
GROWTH = 1.25  # of the number of steps, from one check to the next
CONFIDENCE = 0.99  # of the interval that is checked; the published one has 0.95


def is_check_step(num_steps: int) -> bool:
    """Whether to check the interval after this many steps: 64, and each time a quarter more.

    A check reads the clock, which synchronizes a GPU, and takes time in proportion to the steps.
    With growing distances all checks together cost less than five times the last one.
    """
    check = float(FIRST_CHECK)
    while round(check) < num_steps:
        check *= GROWTH
    return round(check) == num_steps


def is_narrow(
    step_s: Sequence[float], target: float, *, excluded_steps: Collection[int] = ()
) -> bool:
    """Whether the 99 % interval of the median steady step is at most as wide as `target`.

    A run that stops at the first narrow interval often stops at one that is narrow by chance, and
    then the interval covers less than it promises. Hence the checks are few, and their interval is
    stricter than the published one of 95 %, which is narrower still (Chow & Robbins 1965 prove the
    coverage in the limit of a small target; the tests show it here).

    Args:
        step_s: seconds of the steps of this launch on the slowest rank: ranks have to agree.
        target: width of the interval as a share of the median: 0.01 for 1 %.
        excluded_steps: steps known not to be steady, as for `find_steady_state`.

    Raises:
        ValueError: the target is outside (0, 1).
    """
    if not 0 < target < 1:
        raise ValueError(f"target is {target}; give a share between 0 and 1, such as 0.01 for 1 %")
    steady_s = find_steady_state(step_s, excluded_steps).select(step_s)
    if not steady_s:
        return False
    width = describe(steady_s, confidence=CONFIDENCE).relative_width
    return width is not None and width <= target
