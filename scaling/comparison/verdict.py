"""Judges whether a candidate is slower than its base, from pairs of times measured in turn.

Needs no torch and nothing of this project but `unitransformer.stats`.

A verdict decides between two statements: "as fast as the base" and "slower by the threshold".
SLOWER excludes the first, NOT_SLOWER the second. With ever more pairs the verdict flips at half of
the threshold.

Exit codes: 0 not slower | 3 inconclusive | 4 slower | 5 faster by so much that the base is stale.
1 (failed) and 2 (bad usage) mean what they mean in every command.
"""

import enum
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unitransformer.stats.intervals import MIN_SAMPLES, describe
from unitransformer.stats.ranks import interval_rank

THRESHOLD = 0.02  # slowdown that must not pass
STOP_FASTER = 0.10  # speed-up that asks for a new base
CONFIDENCE = 0.99  # of the block bootstrap
# Of the ranks: 0.05 % of equal steps are called slower at each look, 0.15 % at three of them.
RANK_CONFIDENCE = 0.999
LOOKS = (80, 160, 320)  # pairs at which a sequential comparison is judged
Measure = Callable[[int], tuple[Sequence[float], Sequence[float]]]


class Verdict(enum.Enum):
    """What a comparison found; the value is how it is printed."""

    NOT_SLOWER = "NOT SLOWER"
    INCONCLUSIVE = "INCONCLUSIVE"
    SLOWER = "SLOWER"
    FASTER = "FASTER"

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self]


EXIT_CODES = {
    Verdict.NOT_SLOWER: 0,
    Verdict.INCONCLUSIVE: 3,  # as of an inconclusive replay
    Verdict.SLOWER: 4,
    Verdict.FASTER: 5,
}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict with its evidence. Ratios are times of the candidate over those of the base.

    `low` and `high` are None together: then `reason` says why there is no interval.
    """

    verdict: Verdict
    ratio: float | None  # median over the pairs; None without pairs
    low: float | None
    high: float | None  # 99 % interval of the ratio
    pairs: int
    # Slowdown that this many pairs find 95 % of the time; 0.02 is 2 %. None: they find none.
    detectable: float | None
    pairs_needed: int | None = None  # about; None if decided or unknown
    reason: str | None = None  # why it is inconclusive


def judge(
    base: Sequence[float],
    candidate: Sequence[float],
    *,
    threshold: float = THRESHOLD,
    stop_faster: float = STOP_FASTER,
    starts: Sequence[int] = (),
) -> Judgement:
    """Judges pairs of seconds, in the order in which they were measured.

    The two of a pair were measured one after the other, in random order, so that other load and
    slow changes of the machine affect both alike. The ratio is the exponential of the median
    log-ratio. Its interval reaches to the wider of two on each side: the 99 % block bootstrap of
    `describe`, which allows for autocorrelation, and the 99.9 % interval of ranks, which random
    order makes exact for two equal steps, however their times are distributed.

    Args:
        threshold: slowdown that must not pass, such as 0.02 for 2 %.
        stop_faster: speed-up from which on the base is called stale.
        starts: numbers of pairs that each start of both sides measured, if there were several. How
            much the starts differ is then taken for neither autocorrelation nor drift, and the
            interval does not allow for it: the caller must.

    Raises:
        ValueError: different numbers of times, a time that is not above 0 or not finite, or a
            threshold that is not above 0.
    """
    _check(base, candidate, threshold, stop_faster)
    logs = [math.log(b / a) for a, b in zip(base, candidate, strict=True)]
    if len(logs) < MIN_SAMPLES:
        needed = f"too few pairs: {len(logs)}, a verdict needs {MIN_SAMPLES}"
        return _without_interval(logs, needed, MIN_SAMPLES)
    slow = math.log1p(threshold)
    if not starts and (drift := _find_drift(logs, slow)):
        return _without_interval(logs, drift, None)
    bootstrap = describe(_align(logs, starts), confidence=CONFIDENCE)
    if bootstrap.low is None or bootstrap.high is None:
        return _without_interval(logs, f"too few pairs: {bootstrap.reason}", 2 * len(logs))
    (low, high), median = _rank_interval(logs), statistics.median(logs)
    return conclude(
        min(low, median + bootstrap.low - bootstrap.median),
        median,
        max(high, median + bootstrap.high - bootstrap.median),
        pairs=len(logs),
        threshold=threshold,
        stop_faster=stop_faster,
    )


def conclude(
    low: float,
    median: float,
    high: float,
    *,
    pairs: int,
    threshold: float,
    stop_faster: float,
    reach: float = 1.5,
) -> Judgement:
    """Returns what the interval of a log-ratio implies, and the pairs that would decide.

    Args:
        reach: half widths of the interval that a slowdown has to be to be found 95 % of the time;
            an interval of ranks or of many blocks is 3.3 standard errors wide on each side.
    """
    slow, half = math.log1p(threshold), (high - low) / 2
    verdict = decide(low, median, high, slow=slow, fast=math.log1p(stop_faster))
    reason, needed_pairs = None, None
    if verdict is Verdict.INCONCLUSIVE:
        reason = f"neither equal speed nor a slowdown of {threshold:.1%} can be excluded"
        is_slow = median > slow / 2
        too_wide = (median - low) / median if is_slow else (high - median) / (slow - median)
        # The interval narrows with the root of the pairs.
        needed_pairs = math.ceil(max(1.0, too_wide**2) * pairs)
    return Judgement(
        verdict=verdict,
        ratio=math.exp(median),
        low=math.exp(low),
        high=math.exp(high),
        pairs=pairs,
        detectable=math.expm1(max(reach * half, (slow + half) / 2)),
        pairs_needed=needed_pairs,
        reason=reason,
    )


def format_judgement(
    judgement: Judgement, clock: str | None = None, *, measured: str | None = None
) -> str:
    """Returns verdict, ratio, interval, pairs and reason in one line.

    Args:
        measured: replaces the number of pairs.
    """
    parts = [judgement.verdict.value]
    if judgement.ratio is not None or measured is not None:
        counted = measured or f"{judgement.pairs:,} pair{'s' * (judgement.pairs != 1)}"
        about = [format_ratio(judgement), counted]
        about += [] if clock is None else [f"{'GPU' if clock == 'gpu' else clock} time"]
        parts.append(", ".join(about))
    return ": ".join(parts + ([] if judgement.reason is None else [judgement.reason]))


def format_ratio(judgement: Judgement) -> str:
    """Returns the ratio with its interval."""
    if judgement.ratio is None:
        return "no ratio"
    if judgement.low is None or judgement.high is None:
        return f"{judgement.ratio:.3f}x (no interval)"
    return f"{judgement.ratio:.3f}x ({judgement.low:.3f} to {judgement.high:.3f}, 99 %)"


def decide(low: float, median: float, high: float, *, slow: float, fast: float) -> Verdict:
    """Returns the verdict that the interval of a log-ratio implies."""
    if low > 0 and median > slow / 2:
        return Verdict.SLOWER
    if high < -fast:
        return Verdict.FASTER
    if high < slow and median <= slow / 2:
        return Verdict.NOT_SLOWER
    return Verdict.INCONCLUSIVE


def judge_until_decided(
    measure: Measure,
    *,
    looks: Sequence[int] = LOOKS,
    threshold: float = THRESHOLD,
    stop_faster: float = STOP_FASTER,
) -> Judgement:
    """Measures pairs until they decide, at most `looks[-1]`; returns the last judgement.

    Args:
        measure: measures that many further pairs; returns the seconds of base and candidate.
        looks: numbers of pairs at which the comparison is judged, rising.
    """
    base, candidate = list[float](), list[float]()
    for number in looks:
        more = measure(number - len(base))
        base.extend(more[0])
        candidate.extend(more[1])
        judgement = judge(base, candidate, threshold=threshold, stop_faster=stop_faster)
        if judgement.verdict is not Verdict.INCONCLUSIVE:
            break
    return judgement


def looks_upto(pairs: int) -> tuple[int, ...]:
    """Returns the looks of a comparison of at most this many pairs: each doubles the last."""
    looks = [pairs]
    while looks[0] >= 2 * LOOKS[0]:
        looks.insert(0, math.ceil(looks[0] / 2))
    return tuple(looks)


def inconclusive(reason: str) -> Judgement:
    """Returns the judgement of a comparison that its conditions rule out."""
    return _without_interval([], reason, None)


def _without_interval(logs: Sequence[float], reason: str, needed: int | None) -> Judgement:
    return Judgement(
        verdict=Verdict.INCONCLUSIVE,
        ratio=math.exp(statistics.median(logs)) if logs else None,
        low=None,
        high=None,
        pairs=len(logs),
        detectable=None,
        pairs_needed=needed,
        reason=reason,
    )


def _align(logs: Sequence[float], starts: Sequence[int]) -> Sequence[float]:
    """Returns the log-ratios of several starts without the median of each; those of one as is."""
    aligned = list[float]()
    for count in starts:
        part = logs[len(aligned) : len(aligned) + count]
        median = statistics.median(part)
        aligned += [log - median for log in part]
    return aligned or logs


def _rank_interval(logs: Sequence[float]) -> tuple[float, float]:
    """Returns the order statistics that enclose the median; all samples if they are too few."""
    rank, in_order = interval_rank(len(logs), RANK_CONFIDENCE) or 1, sorted(logs)
    return in_order[rank - 1], in_order[-rank]


def _find_drift(logs: Sequence[float], slow: float) -> str | None:
    """Says how the ratio changed between both halves of the pairs; None if it did not.

    What slows both sides alike does not change their ratio.
    """
    middle = len(logs) // 2
    halves = logs[:middle], logs[middle:]
    (low, high), (later_low, later_high) = map(_rank_interval, halves)
    before, after = map(statistics.median, halves)
    if abs(after - before) <= slow or (later_low <= high and low <= later_high):
        return None
    ratios = f"from {math.exp(before):.3f} to {math.exp(after):.3f}"
    return f"drift: the ratio changed {ratios} between both halves of the pairs"


def _check(
    base: Sequence[float], candidate: Sequence[float], threshold: float, stop_faster: float
) -> None:
    if len(base) != len(candidate):
        raise ValueError(
            f"base holds {len(base)} times and candidate {len(candidate)}; give pairs of both"
        )
    for name, times in (("base", base), ("candidate", candidate)):
        for index, seconds in enumerate(times):
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name}[{index}] is {seconds}; give seconds above 0")
    for name, share in (("threshold", threshold), ("stop_faster", stop_faster)):
        if not (math.isfinite(share) and share > 0):
            raise ValueError(f"{name} is {share}; give a share above 0, such as 0.02 for 2 %")
