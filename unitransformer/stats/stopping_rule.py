"""Whether a run knows its median step well enough to end: counts and seconds in, yes or no out."""

from collections.abc import Collection, Sequence

from unitransformer.stats.intervals import describe
from unitransformer.stats.steady_state import find_steady_state

FIRST_LOOK = 64  # steps
GROWTH = 1.25  # of the number of steps, from one look to the next
CONFIDENCE = 0.99  # of the interval that is looked at; the one that is published is of 0.95


def is_check_step(num_steps: int) -> bool:
    """Whether to look at the interval after this many steps: at 64, and each time a quarter later.

    A look reads the clock, which waits for a GPU, and takes time that grows with the steps; looks
    that grow apart cost all together less than five times the last one.
    """
    look = float(FIRST_LOOK)
    while round(look) < num_steps:
        look *= GROWTH
    return round(look) == num_steps


def is_narrow(step_s: Sequence[float], target: float, *, unsteady: Collection[int] = ()) -> bool:
    """Whether the median steady step is known: its 99 % interval, whole, is within `target` of it.

    Who stops at the first interval that is narrow stops too often at one that is so by chance, and
    the interval covers less than it says. Hence few looks (`is_check_step`) and a stricter interval than
    the published one of 95 %, which is then still narrower (Chow & Robbins 1965 show that such
    stopping covers what it promises in the limit of a small target; the tests show it here).

    Args:
        step_s: seconds of the steps of this launch, of the slowest rank: ranks have to agree.
        target: width of the interval from low to high as a share of the median: 0.01 for 1 %.
        unsteady: steps known not to be steady, as for `find_steady_state`.

    Raises:
        ValueError: a target outside (0, 1).
    """
    if not 0 < target < 1:
        raise ValueError(f"target is {target}; give a share between 0 and 1, such as 0.01 for 1 %")
    steady_s = find_steady_state(step_s, unsteady).select(step_s)
    if not steady_s:
        return False
    width = describe(steady_s, confidence=CONFIDENCE).relative_width
    return width is not None and width <= target
