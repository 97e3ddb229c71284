"""Tests the verdict of interleaved runs: within the bound, above it, or open."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.benchmarks import interleaved
from tests.benchmarks.interleaved import ROUNDS, WARM_UP, Arm, check, judge

STEP_S, MOST_S = 1.0, 0.005


def draw(added_s: float, spread_s: float, *, seed: int = 0, count: int = 200) -> list[float]:
    """Seconds that an arm adds to each step."""
    rng = Random(seed)
    return [rng.gauss(added_s, spread_s) for _ in range(count)]


@pytest.mark.parametrize(
    ("added_s", "spread_s", "verdict"),
    [
        (0.001, 0.002, "within"),
        (0.009, 0.002, "above"),
        (0.005, 0.002, "open"),
        (0.001, 0.2, "open"),  # small, but with a wide interval
        (0.009, 0.2, "open"),
    ],
)
def test_overhead_is_within_its_bound_only_if_the_whole_interval_lies_below(
    added_s: float, spread_s: float, verdict: str
) -> None:
    assert judge([draw(added_s, spread_s, seed=seed) for seed in range(2)], MOST_S) == verdict


def test_one_slow_round_does_not_refute_the_bound() -> None:
    assert judge([draw(0.02, 0.002), draw(0.004, 0.02)], MOST_S) == "open"


def test_too_few_pairs_leave_the_verdict_open() -> None:
    assert judge([draw(0.001, 0.002, count=3)], MOST_S) == "open"


def outcome(
    monkeypatch: pytest.MonkeyPatch, added_s: float, spread_s: float, *, waits: float = 0.0
) -> int:
    """Checks an arm that adds so many seconds; returns the number of rounds."""
    asked: list[list[str]] = []

    def take(folder: Path, arms: Mapping[str, Arm], options: Sequence[str]) -> dict[str, Any]:
        asked.append(list(arms))
        base = [STEP_S] * (WARM_UP + 200)
        more = draw(added_s, spread_s, seed=len(asked), count=len(base))
        wait_s = arms["more"].wait_s if "more" in arms else 0.0
        longer = [a + b + wait_s for a, b in zip(base, more, strict=True)]
        return {
            "plain": {"processor": base, "wall": base},
            "more": {"processor": base if waits else longer, "wall": longer},
        }

    monkeypatch.setattr(interleaved, "run_interleaved", take)
    try:
        arms = {"plain": Arm(), "more": Arm(waits=waits)}
        check(Path(), arms, (), 128, {"more": MOST_S}, clocks=("processor", "wall"))
    finally:
        assert asked[0] == ["plain"]
        assert asked[1:] == [["plain", "more"]] * (len(asked) - 1)
    return len(asked) - 1


def test_a_question_settled_in_one_round_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert outcome(monkeypatch, 0.001, 0.002) == 1


def test_noisy_overhead_is_measured_in_further_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 < outcome(monkeypatch, 0.003, 0.015) <= ROUNDS


def test_overhead_that_stays_noisy_skips_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        pytest.skip.Exception, match=r"inconclusive.*800 pairs.*allowed 0\.5%: open"
    ):
        outcome(monkeypatch, 0.001, 0.5)


def test_overhead_above_its_bound_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"more adds 0\.8.%.*allowed 0\.5%: above"):
        outcome(monkeypatch, 0.009, 0.002)


def test_a_control_must_exceed_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(monkeypatch, 0.0, 0.002, waits=0.02) == 2
    with pytest.raises(AssertionError, match=r"of wall time, allowed 0\.5%: within"):
        outcome(monkeypatch, -0.02, 0.002, waits=0.02)
