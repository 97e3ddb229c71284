"""Tests the self-test on series that are made up, and the work that it times."""

import random

import pytest

from scaling.comparison import self_test, work
from scaling.comparison.self_test import (
    OTHER_RULES,
    Series,
    check_promises,
    count_rounds,
    other_rules,
    ranks_differ,
    render,
    windows,
)

SLOWDOWNS = {"base": 1.0, "equal": 1.0, "2 %": 1.02, "5 %": 1.05}


def made_up(rounds: int, factors: dict[str, float], *, drift: float = 0.0) -> Series:
    """Returns a series with noise of 3 %, on a machine that gets slower by `drift` in total."""
    rng = random.Random(0)
    taken = {
        arm: [
            0.01 * factor * (1 + drift * number / rounds) * rng.lognormvariate(0, 0.03)
            for number in range(rounds)
        ]
        for arm, factor in factors.items()
    }
    return {"processor": taken, "wall": taken}


@pytest.fixture(scope="module")
def series() -> Series:
    return made_up(640, SLOWDOWNS)


def test_every_promise_holds_where_the_work_differs_as_it_should(series: Series) -> None:
    checks = check_promises(series, 20)
    assert [check.name for check in checks if not check.holds] == []
    text = "\n".join(render(series, checks, other_rules(series, 20), 20))
    assert text.startswith("self-test: every promise holds")
    assert "20 windows overlap, 2 of them would not" in text


def test_promises_are_broken_where_more_work_takes_no_longer() -> None:
    series = made_up(640, dict.fromkeys(SLOWDOWNS, 1.0))
    broken = [check for check in check_promises(series, 20) if not check.holds]
    assert {check.name for check in broken} == {
        "5 % more work is called slower",
        "2 % more work is called slower",
    }
    assert {check.clock for check in broken} == {"processor"}
    assert render(series, broken, [], 20)[0] == "self-test: 2 promises are broken"


def test_false_alarms_break_a_promise() -> None:
    series = made_up(640, SLOWDOWNS | {"equal": 1.05})
    broken = [check.name for check in check_promises(series, 20) if not check.holds]
    assert "equal steps raise no alarm" in broken


def test_windows_cover_the_whole_series() -> None:
    taken = {"base": [float(number) for number in range(100)]}
    starts = [(window["base"][0], window["base"][-1]) for window in windows(taken, 3, length=20)]
    assert starts == [(0, 19), (40, 59), (80, 99)]


def test_a_stored_time_raises_false_alarms_once_the_machine_drifts() -> None:
    still = {
        (rule, when): alarms for rule, when, alarms, _ in other_rules(made_up(640, SLOWDOWNS), 20)
    }
    drifted = made_up(640, SLOWDOWNS, drift=0.5)
    moved = {(rule, when): alarms for rule, when, alarms, _ in other_rules(drifted, 20)}
    assert all(still[rule, "later"] < 0.3 for rule in OTHER_RULES)
    assert all(moved[rule, "later"] > 0.9 for rule in OTHER_RULES)


def test_ranks_differ_by_5_percent_and_significantly() -> None:
    old = [1 + number / 1000 for number in range(40)]
    assert ranks_differ(old, [1.1 * seconds for seconds in old])
    assert not ranks_differ(old, [1.04 * seconds for seconds in old])  # significant, but small
    assert not ranks_differ(old[:2], [1.1, 1.1])  # large, but not significant


def test_few_trials_are_refused() -> None:
    assert count_rounds(60) >= 640
    with pytest.raises(ValueError, match="trials is 19; fewer than 20 prove nothing"):
        count_rounds(19)


def test_a_measurement_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "BUSY", 0)
    monkeypatch.setattr(self_test, "SEED", "no number")
    with pytest.raises(RuntimeError, match=r"^ValueError: invalid literal"):
        self_test.measure(1)


def test_the_arms_differ_by_their_work() -> None:
    products = work.PRODUCTS
    assert products["equal"] == products["base"]
    assert products["2 %"] == 1.02 * products["base"]
    assert products["5 %"] == 1.05 * products["base"]


def test_each_round_times_every_arm_by_both_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "PRODUCTS", {"base": 2, "equal": 2})
    taken = work.measure(3, 0)
    assert {clock: set(arms) for clock, arms in taken.items()} == {
        "processor": {"base", "equal"},
        "wall": {"base", "equal"},
    }
    assert all(len(arm) == 3 and min(arm) > 0 for arms in taken.values() for arm in arms.values())
