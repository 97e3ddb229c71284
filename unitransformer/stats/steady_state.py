"""Finds where the steady state of a launch begins.

Steady state begins after the last change of level. What recurs, such as a stall every ten steps, is
part of it.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy is slow to import, and a login node may lack it
    from unitransformer.stats.autocorrelation import Bools, Floats

MIN_STEPS = 8  # fewer cannot show that their level holds
MIN_SHARE = 0.25  # of the steps: any ramp looks level at its end
MIN_WINDOW = 48  # steps; shorter windows are not searched for a change
TOLERANCE = 0.01  # a smaller change of the median step is not a change of level
OUTLYING = 5.0  # median absolute deviations, scaled to a normal's standard deviation
METHOD = (
    "after the last change of level (rank CUSUM on seeded windows, medians more than "
    f"{TOLERANCE:.0%} apart) and the outlying steps right after it"
)


@dataclass(frozen=True, kw_only=True)
class SteadyState:
    """The steady steps of one launch; `start` is None where there is no steady state."""

    start: int | None  # step of the launch, from 0
    left_out: tuple[int, ...] = ()  # later steps that were excluded
    method: str = METHOD
    reason: str | None = None  # why there is no start

    def select(self, step_s: Sequence[float]) -> list[float]:
        """Returns the seconds of the steady steps."""
        return [step_s[step] for step in self.steps(len(step_s))]

    def steps(self, count: int) -> list[int]:
        """Returns the steady ones of the first `count` steps of the launch."""
        if self.start is None:
            return []
        left_out = set(self.left_out)
        return [step for step in range(self.start, count) if step not in left_out]


def find_steady_state(step_s: Sequence[float], excluded_steps: Collection[int] = ()) -> SteadyState:
    """Finds where the steps of one launch become steady.

    Looks for a change of level with the rank CUSUM for dependent series (Dehling, Rooch & Taqqu
    2013, "Non-parametric change-point tests for long-range dependent data", weighted as by
    Csorgo & Horvath 1997), and repeats after it until there is none. This leaves out a warm-up, a
    ramp and a shift in the middle of a run. Then it leaves out outlying steps right at the start,
    which are too few to be a level. `excluded_steps` are known not to be steady (compiled,
    recompiled, profiled), anywhere.

    Raises:
        ValueError: a step took no time or infinite time, or an excluded step does not exist.
    """
    import numpy as np

    for step, seconds in enumerate(step_s):
        if not 0 < seconds < math.inf:
            raise ValueError(f"step_s[{step}] is {seconds}; a step takes a finite time above 0")
    for step in excluded_steps:
        if not 0 <= step < len(step_s):
            raise ValueError(f"excluded_steps names step {step}; there are {len(step_s)} from 0 on")
    excluded = set(excluded_steps)
    steps = [step for step in range(len(step_s)) if step not in excluded]
    if len(steps) < MIN_STEPS:
        return SteadyState(start=None, reason=f"{len(steps)} steps, needs {MIN_STEPS}")
    times = np.asarray([step_s[step] for step in steps])
    change = _last_change(times)
    begin = change + _outlying_first(times[change:])
    left, needed = len(steps) - begin, max(MIN_STEPS, math.ceil(MIN_SHARE * len(steps)))
    if left < needed:
        reason = f"the level still changes {left} steps before the end of {len(step_s)}, needs "
        return SteadyState(start=None, reason=f"{reason}{needed} steps of one level")
    start = steps[begin]
    return SteadyState(start=start, left_out=tuple(sorted(s for s in excluded if s > start)))


def _last_change(seconds: "Floats") -> int:
    """Returns the first step after the last change of level; 0 without a change."""
    begin = 0
    while changes := list(_changes(seconds[begin:])):
        begin += max(changes)
    last = _outlying_last(seconds[begin:])
    return len(seconds) - last if last else begin


def _changes(seconds: "Floats") -> Iterator[int]:
    """Yields changes of level in the whole, and in windows of a half and a quarter of it.

    A temporary disturbance leaves the level as it was, so that only windows show it (seeded
    windows: Kovacs, Li, Buehlmann & Munk 2023, "Seeded binary segmentation").
    """
    count = len(seconds)
    for parts in (1, 2, 4):
        width = count // parts
        if parts > 1 and width < MIN_WINDOW:
            return
        for place in range(2 * parts - 1):
            first = place * width // 2
            change = _change(seconds[first : first + width], is_whole=parts == 1)
            if change is not None:
                yield first + change


def _change(seconds: "Floats", *, is_whole: bool) -> int | None:
    """Returns where the level changes most; None if it does not change."""
    import numpy as np

    from unitransformer.stats.autocorrelation import centered_ranks, long_run_variance

    count = len(seconds)
    least = MIN_STEPS // 2  # on either side: fewer are outliers, not a level
    if count < 2 * least:
        return None
    ranks = centered_ranks(seconds)
    splits = np.arange(least, count - least + 1)
    excess = np.cumsum(ranks)[splits - 1] / np.sqrt(splits * (count - splits) / count)
    best = int(np.argmax(np.abs(excess)))
    split = int(splits[best])
    residual = np.concatenate([part - part.mean() for part in (ranks[:split], ranks[split:])])
    deviation = math.sqrt(long_run_variance(residual))
    # From simulation: about 95 % of AR(1) series of 0.5 stay below, window by window.
    threshold = 4.2 + 12 / count if is_whole else 5.2 + 30 / count
    if abs(float(excess[best])) <= threshold * deviation:
        return None
    before, after = float(np.median(seconds[:split])), float(np.median(seconds[split:]))
    return split if abs(before - after) > TOLERANCE * after else None


def _outlying(seconds: "Floats") -> "Bools":
    """Marks the steps far from the median of all."""
    import numpy as np

    median = float(np.median(seconds))
    distance = abs(seconds - median)
    bound = OUTLYING * 1.4826 * float(np.median(distance))  # 1.4826: a normal's deviation
    return distance > max(bound, TOLERANCE * median)


def _outlying_first(seconds: "Floats") -> int:
    """Counts the outlying steps at the start; a single other step among them does not end them."""
    outlying, begin = _outlying(seconds), 0
    while outlying[begin : begin + 2].any():
        begin += 1
    return begin


def _outlying_last(seconds: "Floats") -> int:
    """Counts the consecutive outlying steps at the end; 0 if they are too few to be a level."""
    outlying, number = _outlying(seconds), 0
    while number < len(seconds) and outlying[-1 - number]:
        number += 1
    return number if number >= MIN_STEPS // 2 else 0
