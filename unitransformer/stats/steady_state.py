"""Raw seconds of the steps of one launch in, the steps that are its steady state out.

A step is steady if no later one says otherwise: steady state begins after the last change of
level. What comes back again and again (a stall every ten steps) is steady and stays in.
"""

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unitransformer.stats.autocorrelation import centred_ranks, long_run_variance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_STEPS = 8  # fewer cannot show that their level holds
LEAST_SHARE = 0.25  # of the steps: the end of a ramp that goes on looks level if it is short enough
LEAST_WINDOW = 48  # steps among which a change is looked for apart from the whole
TOLERANCE = 0.01  # a smaller change of the median step is no other state
OUTLYING = 5.0  # median absolute deviations, scaled to a normal's standard deviation
METHOD = (
    "after the last change of level (rank CUSUM on seeded windows, medians more than "
    f"{TOLERANCE:.0%} apart) and the outlying steps right behind it"
)


@dataclass(frozen=True, kw_only=True)
class SteadyState:
    """Where the steady state of one launch begins; `start` is None where there is none."""

    start: int | None  # step of the launch, from 0
    left_out: tuple[int, ...] = ()  # later steps that are known not to be steady
    method: str = METHOD
    reason: str | None = None  # why there is no start

    def select(self, step_s: Sequence[float]) -> list[float]:
        """Seconds of the steady steps; none without a start."""
        return [step_s[step] for step in self.steps(len(step_s))]

    def steps(self, count: int) -> list[int]:
        """The steady ones among the first `count` steps of the launch."""
        if self.start is None:
            return []
        left_out = set(self.left_out)
        return [step for step in range(count) if step >= self.start and step not in left_out]


def find_steady_state(step_s: Sequence[float], unsteady: Collection[int] = ()) -> SteadyState:
    """Where the steps of one launch become steady.

    Looks for a change of level with the rank CUSUM for dependent series (Dehling, Rooch & Taqqu
    2013, "Non-parametric change-point tests for long-range dependent data", weighted as by
    Csorgo & Horvath 1997), and goes on behind it until there is none: a warm-up, a ramp and a shift
    in mid-run are all left behind. Then the outlying steps right at the start are left out, which
    are too few to be a level.

    Args:
        unsteady: steps known to be none (compiled, recompiled, profiled): they are left out,
            wherever they stand, and named in the answer.

    Raises:
        ValueError: a step that took no time or no finite one; an unsteady step that is not there.
    """
    import numpy as np

    _check(step_s, unsteady)
    known = set(unsteady)
    places = [step for step in range(len(step_s)) if step not in known]
    if len(places) < LEAST_STEPS:
        return SteadyState(start=None, reason=f"{len(places)} steps, needs {LEAST_STEPS}")
    seconds_kept = np.asarray([step_s[step] for step in places])
    change = _last_change(seconds_kept)
    begin = change + _outlying_first(seconds_kept[change:])
    left, needed = len(places) - begin, max(LEAST_STEPS, math.ceil(LEAST_SHARE * len(places)))
    if left < needed:
        where = f"the level still changes {left} steps before the end of {len(step_s)}"
        return SteadyState(start=None, reason=f"{where}, needs {needed} steps of one level")
    start = places[begin]
    return SteadyState(start=start, left_out=tuple(sorted(step for step in known if step > start)))


def _check(step_s: Sequence[float], unsteady: Collection[int]) -> None:
    for step, seconds in enumerate(step_s):
        if not 0 < seconds < math.inf:
            raise ValueError(f"step_s[{step}] is {seconds}; a step takes a finite time above 0")
    for step in unsteady:
        if not 0 <= step < len(step_s):
            raise ValueError(f"unsteady names step {step}; there are {len(step_s)}, counted from 0")


def _last_change(seconds: "NDArray[np.float64]") -> int:
    """First step behind the last change of level, 0 if there is none."""
    begin = 0
    while changes := list(_changes(seconds[begin:])):
        begin += max(changes)
    last = _outlying_last(seconds[begin:])
    return len(seconds) - last if last else begin


def _changes(seconds: "NDArray[np.float64]") -> Iterator[int]:
    """Changes of level in the whole and in windows of a half and a quarter of it.

    A disturbance that ends again hides from the whole, which it leaves as it was before (seeded
    windows: Kovacs, Li, Buehlmann & Munk 2023, "Seeded binary segmentation").
    """
    count = len(seconds)
    for parts in (1, 2, 4):
        width = count // parts
        if parts > 1 and width < LEAST_WINDOW:
            return
        for place in range(2 * parts - 1):
            first = place * width // 2
            change = _change(seconds[first : first + width], is_whole=parts == 1)
            if change is not None:
                yield first + change


def _change(seconds: "NDArray[np.float64]", *, is_whole: bool) -> int | None:
    """Where the level changes most, if it changes at all."""
    import numpy as np

    count = len(seconds)
    least = LEAST_STEPS // 2  # on either side: fewer are outliers, not a level
    if count < 2 * least:
        return None
    ranks = centred_ranks(seconds)
    splits = np.arange(least, count - least + 1)
    excess = np.cumsum(ranks)[splits - 1] / np.sqrt(splits * (count - splits) / count)
    best = int(np.argmax(np.abs(excess)))
    split = int(splits[best])
    residual = np.concatenate([part - part.mean() for part in (ranks[:split], ranks[split:])])
    deviation = math.sqrt(long_run_variance(residual))
    # Found by simulating AR(1) series of 0.5: some 95 % of them stay below, window by window.
    threshold = 4.2 + 12 / count if is_whole else 5.2 + 30 / count
    if abs(float(excess[best])) <= threshold * deviation:
        return None
    before, after = _median(seconds[:split]), _median(seconds[split:])
    return split if abs(before - after) > TOLERANCE * after else None


def _median(values: "NDArray[np.float64]") -> float:
    """`np.median`, whose checks take longer than these few values."""
    import numpy as np

    in_order, count = np.sort(values), len(values)
    return float((in_order[(count - 1) // 2] + in_order[count // 2]) / 2)


def _outlying(seconds: "NDArray[np.float64]") -> "NDArray[np.bool_]":
    """Steps far from the median of all: a few of them at an end are too few to be a level."""
    median = _median(seconds)
    distance = abs(seconds - median)
    bound = OUTLYING * 1.4826 * _median(distance)  # 1.4826: a normal's deviation
    return distance > max(bound, TOLERANCE * median)


def _outlying_first(seconds: "NDArray[np.float64]") -> int:
    """Number of outlying steps at the start; one step amid them that is not does not end them."""
    outlying = _outlying(seconds)
    begin = 0
    while outlying[begin : begin + 2].any():
        begin += 1
    return begin


def _outlying_last(seconds: "NDArray[np.float64]") -> int:
    """Number of outlying steps without a gap at the end, 0 if they may be mere spikes."""
    number = 0
    while number < len(seconds) and _outlying(seconds)[-1 - number]:
        number += 1
    return number if number >= LEAST_STEPS // 2 else 0


def slowest(step_s_of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each step on the rank that took longest: the others wait for it.

    Raises:
        ValueError: ranks that disagree on the number of steps.
    """
    return [max(step) for step in zip(*step_s_of_ranks, strict=True)]


def rate_per_s(steady_s: Sequence[float], per_step: float) -> float | None:
    """Units a second at the median steady step; None without steady steps."""
    return per_step / statistics.median(steady_s) if steady_s else None
