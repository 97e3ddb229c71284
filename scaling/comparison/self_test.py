"""Checks the verdicts where they matter: on this machine, beside busy processes.

One long series of rounds is measured, each with a step of the base, an equal one, and ones with 2 %
and 5 % more work. A trial is a window of it. The same windows show what the rules of other tools
say, which compare a stored time with a new one.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from scaling.comparison.interleave import Blocks, SideName, Start, judge_starts
from scaling.comparison.records import judge_launches
from scaling.comparison.verdict import (
    LOOKS,
    STOP_FASTER,
    THRESHOLD,
    Judgement,
    Verdict,
    judge,
    judge_until_decided,
)
from scaling.comparison.work import TURNS
from unitransformer.launch.process_tree import die_with_parent, end_process
from unitransformer.launch.subprocess_module import open_command
from unitransformer.stats.comparisons import describe_launch, split_variance

BUSY = 2  # processes beside the measured one
ROUNDS_PER_TRIAL = 20
SEED = 0
STORED = 40  # samples of a stored baseline, and as many new ones
DRIFT = 1.2
LIMIT_S = 4 * 60 * 60
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
Window = Mapping[str, list[float]]  # seconds by arm
Series = Mapping[str, Window]  # by clock


@dataclass(frozen=True, kw_only=True)
class Check:
    """One promise: how many of the trials had to end as they should, and how many did."""

    name: str
    clock: str
    kept: int
    trials: int
    least: int
    pairs: float | None  # on average, until the verdict

    @property
    def holds(self) -> bool:
        return self.kept >= self.least


def count_rounds(trials: int) -> int:
    """Returns the rounds that so many trials take; raises ValueError for too few trials."""
    if trials < 20:
        raise ValueError(f"trials is {trials}; fewer than 20 prove nothing")
    return max(ROUNDS_PER_TRIAL * trials, 2 * LOOKS[-1])


def measure(rounds: int) -> Series:
    """Returns the series of a process of its own, which uses one thread, beside busy ones.

    Raises RuntimeError if it fails, or takes longer than `LIMIT_S`.
    """
    command = [sys.executable, "-m", "scaling.comparison.work", str(rounds), str(SEED)]
    root = str(Path(__file__).parents[2])
    with (
        _busy_processes(),
        open_command(
            "scaling.comparison.work",
            command,
            limit_s=LIMIT_S,
            variables={**ONE_THREAD, "PYTHONPATH": root},
        ) as ask,
    ):
        series: Series = json.loads(ask(""))
    return series


@contextlib.contextmanager
def _busy_processes() -> Iterator[None]:
    parent = os.getpid()
    command = [sys.executable, "-c", "while True: sum(range(10_000))"]
    processes = [
        subprocess.Popen(command, preexec_fn=lambda: die_with_parent(parent)) for _ in range(BUSY)
    ]
    try:
        yield
    finally:
        for process in processes:
            end_process(process)


def windows(taken: Window, trials: int, length: int = LOOKS[-1]) -> Iterator[Window]:
    """Yields that many windows of the rounds, evenly spaced; neighbors overlap."""
    rounds = len(taken["base"])
    for number in range(trials):
        start = number * (rounds - length) // max(1, trials - 1)
        yield {arm: seconds[start : start + length] for arm, seconds in taken.items()}


def check_promises(series: Series, trials: int) -> list[Check]:
    """Judges every window in every way that is promised."""
    checks = []
    for clock, taken in series.items():
        for arm, name, share in (
            ("equal", "equal steps raise no alarm", None),
            ("5 %", "5 % more work is called slower", 0.98),
            ("2 %", "2 % more work is called slower", 0.90),
        ):
            if clock == "wall" and arm != "equal":
                share = 0.0  # shown, not promised
            judged = [_judge_window(window, arm) for window in windows(taken, trials)]
            found = Counter(judgement.verdict for judgement in judged)
            alarms = found[Verdict.SLOWER] + found[Verdict.FASTER]
            checks.append(
                Check(
                    name=name,
                    clock=clock,
                    kept=trials - alarms if arm == "equal" else found[Verdict.SLOWER],
                    trials=trials,
                    least=trials - math.ceil(trials / 500)
                    if share is None
                    else math.ceil(share * trials),
                    pairs=statistics.fmean(judgement.pairs for judgement in judged),
                )
            )
    refusals: dict[str, Callable[[Window], Judgement]] = {
        "49 pairs are inconclusive": _with_too_few,
        "a ratio that drifts by 20 % is inconclusive": _with_drifting_ratio,
        "a machine that drifts by 20 % between stored launches is inconclusive": _with_drift,
        "another device is inconclusive": _with_other_device,
    }
    for name, judge_window in refusals.items():
        judged = [judge_window(window) for window in windows(series["processor"], trials)]
        kept = sum(judgement.verdict is Verdict.INCONCLUSIVE for judgement in judged)
        checks.append(
            Check(name=name, clock="processor", kept=kept, trials=trials, least=trials, pairs=None)
        )
    return checks


def _judge_window(window: Window, arm: str) -> Judgement:
    base, candidate = iter(window["base"]), iter(window[arm])

    def measure_more(count: int) -> tuple[list[float], list[float]]:
        pairs = [(next(base), next(candidate)) for _ in range(count)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    return judge_until_decided(measure_more)


def _with_too_few(window: Window) -> Judgement:
    return judge(window["base"][:49], window["5 %"][:49])


def _with_drifting_ratio(window: Window) -> Judgement:
    middle = len(window["equal"]) // 2
    later = [DRIFT * seconds for seconds in window["equal"][middle:]]
    return judge(window["base"], window["equal"][:middle] + later)


def _with_drift(window: Window) -> Judgement:
    quarter = len(window["base"]) // 4
    parts = [window["base"][start : start + quarter] for start in range(0, 4 * quarter, quarter)]
    slowed = [[DRIFT * seconds for seconds in part] for part in parts[2:]]
    before, after = (
        split_variance([describe_launch(p) for p in side]) for side in (parts[:2], slowed)
    )
    return judge_launches(
        before, after, drift=math.log(DRIFT), threshold=THRESHOLD, stop_faster=STOP_FASTER
    )


def _with_other_device(window: Window) -> Judgement:
    base, candidate = (
        Blocks(processor_s=window[arm], wall_s=window[arm]) for arm in ("base", "5 %")
    )
    about: dict[SideName, dict[str, str]] = {
        "base": {"device": "cpu", "clock": "processor"},
        "candidate": {"device": "another", "clock": "processor"},
    }
    first: list[SideName] = ["base"] * len(window["base"])
    start = Start(
        steps_per_block=1,
        first=tuple(first),
        base=base,
        candidate=candidate,
        about=about,
    )
    return judge_starts([start, start])


Rule = Callable[[Sequence[float], Sequence[float]], bool]  # of stored and new seconds: slower?


def _rises(measure: Callable[[Sequence[float]], float], by: float) -> Rule:
    return lambda old, new: measure(new) > (1 + by) * measure(old)


def ranks_differ(old: Sequence[float], new: Sequence[float]) -> bool:
    """asv's rule: medians more than 5 % apart, and Mann & Whitney's p (normal) below 0.002."""
    greater = sum((b > a) + 0.5 * (b == a) for a in old for b in new)
    mean = len(old) * len(new) / 2
    deviation = math.sqrt(mean * (len(old) + len(new) + 1) / 6)
    p = 2 * (1 - statistics.NormalDist().cdf(abs(greater - mean) / deviation))
    return p < 0.002 and statistics.median(new) > 1.05 * statistics.median(old)


OTHER_RULES: dict[str, Rule] = {
    "pytest-benchmark, min:5%": _rises(min, 0.05),
    "pytest-benchmark, mean:5%": _rises(statistics.fmean, 0.05),
    "median 7 % above": _rises(statistics.median, 0.07),
    "asv, p < 0.002 and 5 %": ranks_differ,
}


def other_rules(series: Series, trials: int) -> list[tuple[str, str, float, float]]:
    """Returns rule, when the new run was, and the shares of false alarms and of 5 % found.

    As these tools are used: wall time of 40 steps, stored, then of 40 new ones, in the next window
    or half the series later.
    """
    taken = series["wall"]
    rounds = len(taken["base"])
    rows = []
    for rule, says_slower in OTHER_RULES.items():
        for when, apart in (("at once", STORED), ("later", rounds // 2)):
            last = rounds - apart - STORED
            starts = [number * last // (trials - 1) for number in range(trials)]
            shares = [
                statistics.fmean(
                    says_slower(
                        taken["base"][start : start + STORED],
                        taken[arm][start + apart : start + apart + STORED],
                    )
                    for start in starts
                )
                for arm in ("equal", "5 %")
            ]
            rows.append((rule, when, shares[0], shares[1]))
    return rows


def render(
    series: Series,
    checks: Sequence[Check],
    rules: Sequence[tuple[str, str, float, float]],
    trials: int,
) -> list[str]:
    """Returns the answer, both tables, and how the trials were formed."""
    failed = [check for check in checks if not check.holds]
    rounds = len(series["wall"]["base"])
    step_ms = {clock: 1000 * statistics.median(series[clock]["base"]) for clock in series}
    answer = "every promise holds" if not failed else f"{len(failed)} promises are broken"
    table = [
        {
            "promise": check.name,
            "clock": check.clock,
            "kept": f"{check.kept} of {check.trials}",
            "needed": str(check.least) if check.least else "shown only",
            "pairs": "" if check.pairs is None else f"{check.pairs:.0f}",
            "holds": "yes" if check.holds else "NO",
        }
        for check in checks
    ]
    others = [
        {
            "rule": rule,
            "new run": when,
            "false alarms": f"{alarms:.0%}",
            "5 % found": f"{found:.0%}",
        }
        for rule, when, alarms, found in rules
    ]
    return [
        f"self-test: {answer}",
        "",
        tabulate(table, headers="keys", tablefmt="github"),
        "",
        "Rules of other tools on the same steps: a stored wall time, then a new one.",
        "",
        tabulate(others, headers="keys", tablefmt="github"),
        "",
        f"A step takes {step_ms['processor']:.1f} ms of processor time, {step_ms['wall']:.1f} ms "
        f"of wall time, in {TURNS} turns, beside {BUSY} busy processes. A trial is a window of "
        f"{LOOKS[-1]} of {rounds:,} rounds; {trials} windows overlap, {rounds // LOOKS[-1]} of "
        "them would not.",
    ]
