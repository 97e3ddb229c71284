"""Tests verdicts on pairs whose true ratio is known."""

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from scaling.comparison.verdict import (
    LOOKS,
    Judgement,
    Measure,
    Verdict,
    judge,
    judge_until_decided,
    looks_upto,
)
from tests.builders.pairs import Pairs, on_busy_machine


def taken_from(pairs: Pairs) -> Measure:
    left = (iter(pairs[0]), iter(pairs[1]))
    return lambda count: tuple([next(side) for _ in range(count)] for side in left)  # type: ignore


def verdicts(slowdown: float, trials: int) -> Counter[Verdict]:
    return Counter(
        judge_until_decided(taken_from(on_busy_machine(LOOKS[-1], slowdown, seed))).verdict
        for seed in range(trials)
    )


def test_equal_steps_are_never_called_slower() -> None:
    found = verdicts(0.0, 100)
    assert found[Verdict.SLOWER] == found[Verdict.FASTER] == 0
    assert found[Verdict.NOT_SLOWER] > 50


def test_a_slowdown_of_5_percent_is_found() -> None:
    assert verdicts(0.05, 50) == {Verdict.SLOWER: 50}


def test_a_slowdown_of_2_percent_is_not_passed() -> None:
    found = verdicts(0.02, 50)
    assert found[Verdict.NOT_SLOWER] <= 1
    assert found[Verdict.SLOWER] > 25


def test_a_large_speed_up_stops_too() -> None:
    assert judge(*on_busy_machine(160, -0.2, 0)).verdict is Verdict.FASTER
    assert judge(*on_busy_machine(160, -0.05, 0)).verdict is Verdict.NOT_SLOWER


def test_the_judgement_depends_on_the_pairs_alone() -> None:
    pairs = on_busy_machine(100, 0.03, 3)
    assert judge(*pairs) == judge(*pairs)


def test_a_machine_that_slows_down_is_no_drift_of_the_ratio() -> None:
    base, candidate = on_busy_machine(160, 0.05, 1)
    slower = [1 + index / 400 for index in range(160)]
    drifted = [[s * f for s, f in zip(side, slower, strict=True)] for side in (base, candidate)]
    assert judge(*drifted).verdict is Verdict.SLOWER


@pytest.mark.parametrize("seed", range(10))
def test_a_ratio_that_drifts_by_20_percent_is_inconclusive(seed: int) -> None:
    base, candidate = on_busy_machine(160, 0.0, seed)
    candidate[80:] = [1.2 * seconds for seconds in candidate[80:]]
    judgement = judge(base, candidate)
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert judgement.reason is not None
    assert judgement.reason.startswith("drift: ")


def test_too_few_pairs_are_inconclusive_however_large_the_ratio() -> None:
    judgement = judge([1.0] * 49, [2.0] * 49)
    assert judgement == Judgement(
        verdict=Verdict.INCONCLUSIVE,
        ratio=pytest.approx(2.0),
        low=None,
        high=None,
        pairs=49,
        detectable=None,
        pairs_needed=50,
        reason="too few pairs: 49, a verdict needs 50",
    )
    assert judge([], []).ratio is None


def test_an_inconclusive_comparison_says_how_many_pairs_would_decide() -> None:
    base, candidate = on_busy_machine(2000, 0.03, 5, deviation=0.3)
    judgement = judge(base[:80], candidate[:80])
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert judgement.pairs_needed is not None
    assert 80 < judgement.pairs_needed < 2000
    assert judge(base, candidate).verdict is Verdict.SLOWER


def test_four_times_the_pairs_find_half_the_slowdown() -> None:
    base, candidate = on_busy_machine(1600, 0.0, 2)
    few = judge(base[:400], candidate[:400], threshold=1e-3)
    many = judge(base, candidate, threshold=1e-3)
    assert few.detectable is not None
    assert many.detectable is not None
    assert many.detectable < 0.7 * few.detectable


def test_a_clear_slowdown_ends_the_measurement_at_the_first_look() -> None:
    base, candidate = on_busy_machine(LOOKS[-1], 0.3, 0)
    assert judge_until_decided(taken_from((base, candidate))).pairs == LOOKS[0]


def test_looks_double_up_to_the_limit() -> None:
    assert looks_upto(320) == LOOKS
    assert looks_upto(1000) == (125, 250, 500, 1000)
    assert looks_upto(60) == (60,)


@pytest.mark.parametrize(
    ("base", "candidate", "message"),
    [
        ([1.0], [1.0, 2.0], "base holds 1 times and candidate 2; give pairs of both"),
        ([0.0], [1.0], r"base\[0\] is 0.0; give seconds above 0"),
        ([1.0], [math.nan], r"candidate\[0\] is nan; give seconds above 0"),
    ],
)
def test_what_is_no_pair_of_times_is_refused(
    base: Sequence[float], candidate: Sequence[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        judge(base, candidate)


def test_a_threshold_must_be_above_0() -> None:
    with pytest.raises(ValueError, match="threshold is 0; give a share above 0"):
        judge([1.0], [1.0], threshold=0)


def test_every_verdict_has_an_exit_code_of_its_own() -> None:
    codes = {verdict.exit_code for verdict in Verdict}
    assert len(codes) == 4
    assert Verdict.NOT_SLOWER.exit_code == 0
    assert not codes & {1, 2, 75}  # failed, bad usage, stopped


def test_other_projects_can_judge_without_torch(repository: Path) -> None:
    code = """
import sys
from scaling.comparison.verdict import judge
print(judge([1.0, 1.1] * 40, [1.1, 1.2] * 40).verdict.value)
assert not {"torch", "lightning", "scaling.peers"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == "SLOWER\n"
