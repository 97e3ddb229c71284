"""Tests the self-test on times that are made up, and the work that it times."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaling.__main__ import main
from scaling.comparison import interleave, self_test, verdict, work
from scaling.comparison.self_test import (
    OTHER_RULES,
    Times,
    check_trials,
    derive,
    measure,
    ranks_differ,
    read,
    write,
)
from scaling.comparison.verdict import Judgement
from scaling.store.reader import load_store
from scaling.store.self_test import pack, read_self_test, unpack, upper_bound
from tests.builders.self_tests import SLOWDOWNS, make_self_test, make_times
from unitransformer.record.checksums import add_checksums


def broken(times: Times) -> set[str]:
    return {row["name"] for row in derive(times)["promises"] if row["kept"] < row["least"]}


FOUND = {"5 % more work is called slower", "2 % more work is called slower"}
REFUSED = {
    "49 pairs are inconclusive",
    "a ratio that drifts by 20 % is inconclusive",
    "records of a machine whose ceilings drift by 20 % are inconclusive",
    "another device is inconclusive",
}


def test_every_promise_holds_where_the_work_differs_as_it_should() -> None:
    assert broken(make_times()) == set()


def test_promises_are_broken_where_more_work_takes_no_longer() -> None:
    assert broken(make_times(8, dict.fromkeys(SLOWDOWNS, 1.0))) == FOUND


def test_false_alarms_break_a_promise() -> None:
    assert "equal steps raise no alarm" in broken(make_times(8, SLOWDOWNS | {"equal": 1.05}))


def test_noise_alone_keeps_no_promise_that_something_is_inconclusive() -> None:
    assert broken(make_times(8, noise=1.0)) == FOUND | REFUSED


def without_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither halves nor neighbors are compared any more."""
    describe, rng = verdict.describe, random.Random(0)
    monkeypatch.setattr(verdict, "_find_drift", lambda logs, slow: None)
    monkeypatch.setattr(
        verdict, "describe", lambda logs, **how: describe(rng.sample(logs, len(logs)), **how)
    )


def with_49_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs count several times."""
    judge = self_test.judge
    monkeypatch.setattr(
        self_test, "judge", lambda base, candidate: judge([*base] * 7, [*candidate] * 7)
    )


def with_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_starts = self_test.judge_starts

    def judge_as_one_device(starts: Sequence[interleave.Start]) -> Judgement:
        about = {name: dict(starts[0].about["base"]) for name in interleave.SIDES}
        return judge_starts([replace(start, about=about) for start in starts])

    monkeypatch.setattr(self_test, "judge_starts", judge_as_one_device)


def with_steady_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_launches = self_test.judge_launches

    def judge_without_drift(*launches: Any, drift: float, **how: Any) -> Judgement:
        return judge_launches(*launches, drift=0.0, **how)

    monkeypatch.setattr(self_test, "judge_launches", judge_without_drift)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (with_49_pairs, "49 pairs are inconclusive"),
        (without_order, "a ratio that drifts by 20 % is inconclusive"),
        (
            with_steady_ceilings,
            "records of a machine whose ceilings drift by 20 % are inconclusive",
        ),
        (with_any_device, "another device is inconclusive"),
    ],
)
def test_a_rule_that_no_longer_refuses_breaks_its_promise(
    fault: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert expected in broken(make_times(8))


def test_a_stored_time_raises_false_alarms_once_the_machine_drifts() -> None:
    still, moved = (
        {rule["name"]: rule["false_alarms"] for rule in derive(make_times(8, drift=drift))["rules"]}
        for drift in (0.0, 0.5)
    )
    assert still.keys() == moved.keys() == {self_test.OURS, *OTHER_RULES}
    assert set(still.values()) == {0}
    assert moved.pop(self_test.OURS) == 0
    assert set(moved.values()) == {4}  # of 8: where the stored time is the earlier one


def test_ranks_differ_by_5_percent_and_significantly() -> None:
    old = [1 + number / 1000 for number in range(40)]
    assert ranks_differ(old, [1.1 * seconds for seconds in old])
    assert not ranks_differ(old, [1.04 * seconds for seconds in old])  # significant, but small
    assert not ranks_differ(old[:2], [1.1, 1.1])  # large, but not significant


def test_few_trials_are_refused() -> None:
    check_trials(20)
    with pytest.raises(ValueError, match="trials is 19; fewer than 20 prove nothing"):
        check_trials(19)


def test_no_alarm_in_500_trials_shows_that_they_are_rarer_than_one_in_100() -> None:
    assert upper_bound(0, 500) == pytest.approx(1 - 0.05 ** (1 / 500))
    assert upper_bound(0, 20) == pytest.approx(0.139, abs=1e-3)
    assert 0.05 < upper_bound(3, 100) < 0.08
    assert upper_bound(5, 5) == 1


def test_trials_are_stretches_of_their_own_in_the_order_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(rounds: int, *, seed: int) -> Any:
        seconds = [(seed * 1000 + number + 1) / 1e6 for number in range(rounds)]
        return {clock: dict.fromkeys(work.PRODUCTS, seconds) for clock in ("processor", "wall")}

    monkeypatch.setattr(self_test, "BUSY", 0)
    monkeypatch.setattr(self_test, "_run_work", run)
    lines: list[str] = []
    times = measure(30, print_line=lines.append)
    base = times["processor"]["base"]
    assert [len(trial) for trial in base] == [320] * 30
    assert len({time for trial in base for time in trial}) == 30 * 320
    assert [base[1][0], base[20][0]] == [321, 20_001]
    assert times["wall"]["5 %"][0][0] == sum(range(1, 9))
    assert lines == ["20 of 30 trials measured", "30 of 30 trials measured"]


def test_a_measurement_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "BUSY", 0)
    monkeypatch.setattr(self_test, "LOOKS", ("no number",))
    with pytest.raises(RuntimeError, match=r"^ValueError: invalid literal"):
        measure(1, print_line=print)


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return make_self_test()


def test_a_record_is_read_and_judged_again(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "self-test.json"
    write(content, path)
    assert main(["compare", "--reread", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("self-test: every promise holds\n")
    assert "A trial is a stretch of 320 rounds, which no other trial uses." in printed
    assert "0 false alarms in 20 trials: with 95 % confidence their rate is below 13.9%" in printed
    store = load_store([tmp_path], relative_to=tmp_path)
    assert [test.name for test in store.self_tests] == ["self-test.json"]
    assert main(["compare", "--reread", str(path), "--plot", str(tmp_path / "a.png")]) == 2
    assert "is the record of a self-test; leave --plot out" in capsys.readouterr().err


def test_broken_promises_are_named_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    equal = make_times(8, dict.fromkeys(SLOWDOWNS, 1.0))
    monkeypatch.setattr(self_test, "measure", lambda trials, *, print_line: equal)
    out = tmp_path / "self-test.json"
    assert main(["compare", "--self-test", "--trials", "20", "--out", str(out)]) == 1
    assert "self-test: 2 of 7 promises are broken" in capsys.readouterr().out
    test = read(out)
    assert test is not None
    assert test.content["command"].endswith("--self-test --trials 20")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["rules"][0].update(false_alarms=1), "rules was changed after"),
        (lambda c: c.pop("wall_us"), "wall_us is missing"),
        (lambda c: c.update(schema=3), "schema is 3; this version reads 1 and 2"),
    ],
)
def test_a_record_that_was_changed_is_refused(
    content: dict[str, Any], change: Any, message: str, tmp_path: Path
) -> None:
    changed = json.loads(json.dumps(content))
    change(changed)
    (tmp_path / "self-test.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "self-test.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["rules"][1].update(false_alarms=9), "false_alarms is 9 in the record, 0 by"),
        (lambda c: c["promises"].pop(), "another device is inconclusive: name is None in the"),
    ],
)
def test_results_that_the_times_contradict_are_refused(
    content: dict[str, Any], change: Any, message: str, tmp_path: Path
) -> None:
    changed = json.loads(json.dumps(content))
    change(changed)
    write(add_checksums(changed), tmp_path / "self-test.json")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "self-test.json")


@pytest.mark.parametrize("times", [[1.0] * 319, [0.0] * 320, ["1"] * 320, None])
def test_a_trial_without_its_times_is_refused(content: dict[str, Any], times: Any) -> None:
    changed = json.loads(json.dumps(content))
    trials = unpack(changed["processor_us"]["2 %"])
    trials[3] = times
    changed["processor_us"]["2 %"] = pack(trials)
    with pytest.raises(ValueError, match=r"processor_us\.2 % is not 320 times above 0 for each"):
        read_self_test(changed, "a", checksums_hold=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_trials": 0}, "num_trials is 0; it must be at least 1"),
        ({"steps_per_stored_time": 0}, "steps_per_stored_time is 0; it must be at least 1"),
        ({"rules": []}, "rules is empty"),
    ],
)
def test_a_record_of_no_trials_is_refused_though_its_checksums_hold(
    content: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    changed = content | change
    for clock in ("processor_us", "wall_us"):
        kept = None if changed["num_trials"] else 0
        changed[clock] = {arm: pack(unpack(text)[:kept]) for arm, text in content[clock].items()}
    write(add_checksums(changed), tmp_path / "self-test.json")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "self-test.json")


@pytest.mark.parametrize("text", ["", "no times", pack([])[:-1], None, [[1.0]]])
def test_times_that_cannot_be_unpacked_are_refused(content: dict[str, Any], text: Any) -> None:
    changed = json.loads(json.dumps(content))
    changed["processor_us"]["2 %"] = text
    with pytest.raises(ValueError, match=r"processor_us\.2 % is not 320 times above 0 for each"):
        read_self_test(changed, "a", checksums_hold=True)


def test_a_record_of_plain_lists_is_still_read(content: dict[str, Any]) -> None:
    lists = {
        name: {arm: unpack(text) for arm, text in content[name].items()}
        for name in ("processor_us", "wall_us")
    }
    old = read_self_test(content | lists | {"schema": 1}, "a", checksums_hold=True)
    new = read_self_test(content, "a", checksums_hold=True)
    assert old.content["processor_us"] == new.content["processor_us"] == lists["processor_us"]
    assert self_test.find_contradictions(old) == []


@pytest.mark.parametrize("alarms", [-1, 21])
def test_more_alarms_than_trials_are_refused(content: dict[str, Any], alarms: int) -> None:
    changed = json.loads(json.dumps(content))
    changed["rules"][0]["false_alarms"] = alarms
    with pytest.raises(ValueError, match=f"false_alarms is {alarms} in 20 trials"):
        read_self_test(changed, "a", checksums_hold=True)


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
