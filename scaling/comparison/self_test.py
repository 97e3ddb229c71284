"""Checks the verdicts where they matter: on this machine, beside busy processes.

Each round times a step of the base, an equal one, and ones with 2 % and 5 % more work. A trial is
a stretch of rounds that no other trial uses. It is judged as `compare` judges its starts. Nothing
is drawn twice, and no time is made up but where a promise is about a machine that changes. The same
times show what the rules of other tools say, which compare a stored time with a new one.
"""

import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from scaling.comparison.interleave import (
    Blocks,
    SideName,
    Start,
    judge_starts,
    look_until_decided,
    split_into_starts,
)
from scaling.comparison.records import judge_launches
from scaling.comparison.verdict import (
    LOOKS,
    STOP_FASTER,
    THRESHOLD,
    Judgement,
    Verdict,
    judge,
)
from scaling.comparison.work import PRODUCTS, SIZE, TURNS
from scaling.store.self_test import KIND, SCHEMA, SelfTest, pack, read_self_test
from unitransformer.files import write_atomically
from unitransformer.launch.process_tree import die_with_parent, end_process
from unitransformer.launch.subprocess_module import open_command
from unitransformer.record.checksums import add_checksums, parse_json, to_text
from unitransformer.record.fields import agree
from unitransformer.stats.comparisons import describe_launch, split_variance

BUSY = 2  # processes beside the measured one
TRIALS_PER_PROCESS = 20  # each process measures other trials
STORED = 40  # samples of a stored baseline, and as many new ones
STEPS_PER_STORED = LOOKS[-1] // STORED  # both rules see the same steps
LAUNCHES = 4  # in each of two folders of records, made of as many trials
TOO_FEW = 49  # pairs
DRIFT = 1.2
LIMIT_S = 60 * 60  # of one process
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
OURS = "ours: pairs in random order, median log-ratio"
Window = Mapping[str, Sequence[float]]  # microseconds by arm
Times = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]  # by clock, arm and trial
Results = Mapping[str, list[dict[str, Any]]]  # promises and rules, as a record holds them


def check_trials(trials: int) -> None:
    """Raises ValueError for too few trials."""
    if trials < 20:
        raise ValueError(f"trials is {trials}; fewer than 20 prove nothing")


def measure(trials: int, *, print_line: Callable[[str], None]) -> Times:
    """Returns the times of so many trials, measured with one thread beside busy processes.

    The clock `processor` has each step of a trial, `wall` sums of `STEPS_PER_STORED` of them.
    Raises RuntimeError if a process fails, or takes longer than `LIMIT_S`.
    """
    times = {clock: {arm: list[list[float]]() for arm in PRODUCTS} for clock in CLOCKS}
    with _busy_processes():
        for begin in range(0, trials, TRIALS_PER_PROCESS):
            count = min(TRIALS_PER_PROCESS, trials - begin)
            series = _run_work(LOOKS[-1] * count, seed=begin)
            for clock, steps in CLOCKS.items():
                for arm, seconds in series[clock].items():
                    us = [1e6 * math.fsum(seconds[i : i + steps]) for i in _places(seconds, steps)]
                    length = len(us) // count
                    times[clock][arm] += [
                        [round(value) for value in us[i : i + length]] for i in _places(us, length)
                    ]
            print_line(f"{begin + count} of {trials} trials measured")
    return times


CLOCKS = {"processor": 1, "wall": STEPS_PER_STORED}  # steps of each time that is kept


def _places(values: Sequence[float], step: int) -> range:
    return range(0, len(values), step)


def _run_work(rounds: int, *, seed: int) -> Mapping[str, Window]:
    command = [sys.executable, "-m", "scaling.comparison.work", str(rounds), str(seed)]
    variables = {**ONE_THREAD, "PYTHONPATH": str(Path(__file__).parents[2])}
    with open_command(
        "scaling.comparison.work", command, limit_s=LIMIT_S, variables=variables
    ) as ask:
        series: Mapping[str, Window] = json.loads(ask(""))
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


def derive(times: Times) -> Results:
    """Judges every trial in every way that is promised, and by every rule."""
    arms = ("equal", "2 %", "5 %")
    trials = _trials(times)
    judged = {arm: [judge_trial(trial, arm) for trial in trials] for arm in arms}
    return {
        "promises": [*_promises(judged), *_refusals(trials)],
        "rules": [
            {
                "name": OURS,
                "false_alarms": _count(judged["equal"], Verdict.SLOWER, Verdict.FASTER),
                "found_2_percent": _count(judged["2 %"], Verdict.SLOWER),
                "found_5_percent": _count(judged["5 %"], Verdict.SLOWER),
                "inconclusive": sum(_count(judged[arm], Verdict.INCONCLUSIVE) for arm in arms),
            },
            *_other_rules(times["wall"]),
        ],
    }


def _trials(times: Times) -> list[Window]:
    arms = times["processor"]
    return [dict(zip(arms, trial, strict=True)) for trial in zip(*arms.values(), strict=True)]


def judge_trial(trial: Window, arm: str) -> Judgement:
    """Judges an arm as `compare` does: each look takes further starts."""
    starts = list[Start]()

    def judge_more(pairs: int) -> Judgement:
        measured = sum(len(start.first) for start in starts)
        starts.extend(_starts(trial, arm, measured, measured + pairs))
        return judge_starts(starts)

    return look_until_decided(judge_more, LOOKS)


def _starts(trial: Window, arm: str, begin: int, end: int, device: str = "cpu") -> Iterator[Start]:
    """Yields rounds as `compare` would start processes for them; these are all of one process."""
    for size in split_into_starts(end - begin):
        yield _start(trial, arm, slice(begin, begin + size), device)
        begin += size


def _start(trial: Window, arm: str, rounds: slice, device: str = "cpu") -> Start:
    base, candidate = (
        Blocks(processor_s=list(trial[side][rounds]), wall_s=[]) for side in ("base", arm)
    )
    about: dict[SideName, dict[str, str]] = {
        "base": {"device": "cpu", "clock": "processor"},
        "candidate": {"device": device, "clock": "processor"},
    }
    first: list[SideName] = ["base"] * len(base.processor_s)
    return Start(steps_per_block=1, first=tuple(first), base=base, candidate=candidate, about=about)


def _promises(judged: Mapping[str, Sequence[Judgement]]) -> Iterator[dict[str, Any]]:
    trials = len(judged["equal"])
    alarms = _count(judged["equal"], Verdict.SLOWER, Verdict.FASTER)
    for name, arm, kept, least in (
        ("equal steps raise no alarm", "equal", trials - alarms, trials - math.ceil(trials / 500)),
        ("5 % more work is called slower", "5 %", None, math.ceil(0.98 * trials)),
        ("2 % more work is called slower", "2 %", None, math.ceil(0.90 * trials)),
    ):
        yield {
            "name": name,
            "kept": _count(judged[arm], Verdict.SLOWER) if kept is None else kept,
            "num_trials": trials,
            "least": least,
            "pairs": statistics.fmean(judgement.pairs for judgement in judged[arm]),
        }


def _count(judged: Sequence[Judgement], *verdicts: Verdict) -> int:
    return sum(judgement.verdict in verdicts for judgement in judged)


def _refusals(trials: Sequence[Window]) -> Iterator[dict[str, Any]]:
    """Yields the promises that some comparisons are inconclusive.

    Only trials count in which the same times are decided without the condition that must prevent
    it, so that noise refuses nothing; they have to be half of all.
    """
    last = len(trials) - LAUNCHES + 1
    groups = [trials[begin : begin + LAUNCHES] for begin in range(0, last, LAUNCHES)]
    for name, judged in (
        (f"{TOO_FEW} pairs are inconclusive", [*map(_with_too_few, trials)]),
        ("a ratio that drifts by 20 % is inconclusive", [*map(_with_drifting_ratio, trials)]),
        (
            "records of a machine whose ceilings drift by 20 % are inconclusive",
            [*map(_with_drift, groups)],
        ),
        ("another device is inconclusive", [*map(_with_other_device, trials)]),
    ):
        decided = [refused for free, refused in judged if free.verdict is not Verdict.INCONCLUSIVE]
        yield {
            "name": name,
            "kept": _count(decided, Verdict.INCONCLUSIVE),
            "num_trials": len(decided),
            "least": max(len(decided), math.ceil(len(judged) / 2)),
            "pairs": None,
        }


def _with_too_few(trial: Window) -> tuple[Judgement, Judgement]:
    base, slow = trial["base"], trial["5 %"]
    return judge(base, slow), judge(base[:TOO_FEW], slow[:TOO_FEW])


def _with_drifting_ratio(trial: Window) -> tuple[Judgement, Judgement]:
    base, equal = trial["base"], list(trial["equal"])
    middle = len(equal) // 2
    later = [DRIFT * time for time in equal[middle:]]
    return judge(base, equal), judge(base, equal[:middle] + later)


def _with_drift(trials: Sequence[Window]) -> tuple[Judgement, Judgement]:
    """Judges records after which everything takes 20 % longer: without their ceilings, and with.

    The rounds of four trials are dealt to the launches of both folders at random: in their order,
    other load alone would leave them undecided. The ceilings are times of other work in the same
    rounds.
    """
    joined = {arm: [time for trial in trials for time in trial[arm]] for arm in PRODUCTS}
    order = list(range(len(joined["base"])))
    random.Random(0).shuffle(order)
    launches = [order[launch::LAUNCHES] for launch in range(LAUNCHES)]
    before, after = (
        split_variance(
            [describe_launch([by * joined[arm][i] for i in launch]) for launch in launches]
        )
        for arm, by in (("base", 1.0), ("equal", DRIFT))
    )
    ceilings = [statistics.median(joined[arm]) / PRODUCTS[arm] for arm in ("5 %", "2 %")]
    free, refused = (
        judge_launches(
            before,
            after,
            drift=abs(math.log(slowed * ceilings[1] / ceilings[0])),
            threshold=THRESHOLD,
            stop_faster=STOP_FASTER,
        )
        for slowed in (1.0, DRIFT)
    )
    return free, refused


def _with_other_device(trial: Window) -> tuple[Judgement, Judgement]:
    free, refused = (
        judge_starts([*_starts(trial, "5 %", 0, len(trial["base"]), device)])
        for device in ("cpu", "another")
    )
    return free, refused


Rule = Callable[[Sequence[float], Sequence[float]], bool]  # of stored and new times: slower?


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


def _other_rules(wall: Mapping[str, Sequence[Sequence[float]]]) -> Iterator[dict[str, Any]]:
    """Applies rules as their tools do: wall time of a trial, stored, then that of another trial.

    The new times are half the series away from the stored ones. Each trial is stored once.
    """
    trials = len(wall["base"])
    for name, says_slower in OTHER_RULES.items():
        found = {
            arm: sum(
                says_slower(wall["base"][number], wall[arm][(number + trials // 2) % trials])
                for number in range(trials)
            )
            for arm in ("equal", "2 %", "5 %")
        }
        yield {
            "name": name,
            "false_alarms": found["equal"],
            "found_2_percent": found["2 %"],
            "found_5_percent": found["5 %"],
            "inconclusive": None,
        }


def describe(times: Times, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a record; `about` holds its command, start, seconds, machine, code."""
    return add_checksums(
        {
            "schema": SCHEMA,
            "kind": KIND,
            **about,
            "busy_processes": BUSY,
            "num_trials": len(times["processor"]["base"]),
            "pairs_per_trial": LOOKS[-1],
            "stored_times": STORED,
            "steps_per_stored_time": STEPS_PER_STORED,
            "step": {"products": PRODUCTS, "turns": TURNS, "size": SIZE},
            **derive(times),
            **{
                f"{clock}_us": {arm: pack(trials) for arm, trials in arms.items()}
                for clock, arms in times.items()
            },
        }
    )


def write(content: Mapping[str, Any], path: Path) -> None:
    """Writes a record; raises OSError."""
    write_atomically(path, to_text(content).encode())


def read(path: Path) -> SelfTest | None:
    """Reads a record; None if the file is something else.

    Raises ValueError if it was changed, or if its times imply other results.
    """
    try:
        content, checksums_hold = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        return None
    try:
        read = read_self_test(content, path.name, checksums_hold=checksums_hold)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for line in find_contradictions(read):
        raise ValueError(f"{path}: {line}")
    return read


def find_contradictions(test: SelfTest) -> list[str]:
    """Returns stored results that the times contradict."""
    content = test.content
    derived = derive({clock: content[f"{clock}_us"] for clock in CLOCKS})
    found = []
    for group, rows in derived.items():
        stored = {row["name"]: row for row in content[group]}
        for row in rows:
            for name, value in row.items():
                kept = stored.get(row["name"], {}).get(name)
                if not agree(kept, value):
                    where = f"{group}, {row['name']}: {name}"
                    found.append(f"{where} is {kept} in the record, {value} by its times")
    return found


def render(test: SelfTest) -> list[str]:
    """Returns the answer, both tables, and how the trials were formed."""
    content = test.content
    failed = test.broken_promises
    answer = "every promise holds"
    if failed:
        answer = f"{len(failed)} of {len(content['promises'])} promises are broken"
    promises = [
        {
            "promise": promise["name"],
            "kept": f"{promise['kept']} of {promise['num_trials']}",
            "needed": promise["least"],
            "pairs": "" if promise["pairs"] is None else f"{promise['pairs']:.0f}",
            "holds": "NO" if promise in failed else "yes",
        }
        for promise in content["promises"]
    ]
    return [
        f"self-test: {answer}",
        "",
        tabulate(promises, headers="keys", tablefmt="github"),
        "",
        tabulate(test.rule_rows(), headers="keys", tablefmt="github"),
        "",
        *test.explain(),
    ]
