"""Bisection on simulated steps: no training, no repository."""

import math
import random
from collections.abc import Callable, Mapping

import pytest

from scaling.comparison.bisection import (
    CannotMeasure,
    Culprit,
    Halving,
    bisect_by_counters,
    bisect_by_time,
    find_ancestors,
)
from scaling.comparison.history import History, list_versions
from scaling.comparison.verdict import LOOKS, Judgement, Verdict, judge_until_decided, looks_upto
from tests.builders.revisions import linear

NAMES = tuple(f"c{number}" for number in range(16))
LOADED = 0.35  # deviation of the logarithm of a step that other processes disturb
ALIKE = 0.9  # share of the variance that both steps of a pair have in common


def _history(parents: Mapping[str, tuple[str, ...]]) -> History:
    return History(parents=parents, titles={name: f"{name} title" for name in parents})


def _silent(line: str) -> None: ...


def _simulate(
    ratios: Mapping[str, float],
    *,
    seed: int = 0,
    failing: tuple[str, ...] = (),
    noise: float = LOADED,
) -> tuple[Callable[[str, str, float], Judgement], list[str]]:
    """A measure that draws noisy pairs, and the names that it was asked for."""
    rng = random.Random(seed)
    asked: list[str] = []

    def measure(base: str, candidate: str, threshold: float) -> Judgement:
        asked.append(candidate)
        if candidate in failing:
            raise CannotMeasure("it does not train")

        def pairs(number: int) -> tuple[list[float], list[float]]:
            common = [rng.gauss(0, noise * math.sqrt(ALIKE)) for _ in range(number)]
            own = noise * math.sqrt(1 - ALIKE)
            first, second = (
                [ratios[name] * math.exp(c + rng.gauss(0, own)) for c in common]
                for name in (base, candidate)
            )
            return first, second

        looks = looks_upto(4 * LOOKS[-1])
        return judge_until_decided(pairs, looks=looks, threshold=threshold, stop_faster=10)

    return measure, asked


def _planted(culprit: int, slowdown: float) -> dict[str, float]:
    return {name: 1 + slowdown * (number >= culprit) for number, name in enumerate(NAMES)}


def _bisect(ratios: Mapping[str, float], **how: object) -> tuple[Culprit, list[str]]:
    measure, asked = _simulate(ratios, **how)  # type: ignore[arg-type]
    history = _history(linear(NAMES))
    return bisect_by_time(history, measure, threshold=0.02, print_line=_silent), asked


@pytest.mark.parametrize("seed", range(10))
def test_a_slowdown_of_5_percent_is_found_among_16_commits_on_a_loaded_machine(seed: int) -> None:
    culprit, asked = _bisect(_planted(1 + seed, 0.05), seed=seed)
    assert culprit.suspects == (f"c{1 + seed}",)
    assert culprit.parent == f"c{seed}"
    assert culprit.is_confirmed
    assert culprit.judgement is not None
    assert culprit.judgement.low is not None
    assert culprit.judgement.low < 1.05 < culprit.judgement.high
    assert len(asked) <= 6  # both ends, four halvings, the culprit against its parent


def test_nothing_is_bisected_if_the_last_commit_is_not_slower() -> None:
    culprit, asked = _bisect(_planted(99, 0.05), noise=0.1)
    assert culprit.whole.verdict is Verdict.NOT_SLOWER
    assert culprit.suspects == ()
    assert asked == ["c15"]


def test_commits_that_do_not_train_are_skipped_and_the_culprit_is_a_range_around_them() -> None:
    failing = ("c6", "c7", "c8")
    culprit, _ = _bisect(_planted(7, 0.05), failing=failing)
    assert culprit.suspects == ("c6", "c7", "c8", "c9")
    assert culprit.parent == "c5"
    assert dict(culprit.skipped) == dict.fromkeys(failing, "it does not train")


def test_commits_far_from_the_culprit_may_fail_without_widening_it() -> None:
    culprit, _ = _bisect(_planted(12, 0.05), failing=("c7", "c8"))
    assert culprit.suspects == ("c12",)


def test_a_commit_that_stays_inconclusive_is_skipped() -> None:
    # Half as slow as BAD is as near to GOOD as to BAD.
    ratios = {**_planted(8, 0.05), "c7": 1.025}
    culprit, _ = _bisect(ratios, noise=0.6)
    assert set(culprit.suspects) <= {"c7", "c8"}
    assert all("inconclusive after 1280 pairs" in why for why in culprit.skipped.values())


def test_a_culprit_whose_last_confirmation_fails_is_named_but_not_confirmed() -> None:
    measure, _ = _simulate(_planted(9, 0.05))

    def measure_against_the_first(base: str, candidate: str, threshold: float) -> Judgement:
        if base != "c0":
            raise CannotMeasure("out of memory")
        return measure(base, candidate, threshold)

    lines: list[str] = []
    culprit = bisect_by_time(
        _history(linear(NAMES)),
        measure_against_the_first,
        threshold=0.02,
        print_line=lines.append,
    )
    assert (culprit.suspects, culprit.parent) == (("c9",), "c8")
    assert (culprit.judgement, culprit.not_judged) == (None, "out of memory")
    assert not culprit.is_confirmed
    assert lines[-1] == "  cannot be measured: out of memory"


def test_an_end_that_does_not_train_is_an_error() -> None:
    with pytest.raises(CannotMeasure, match="does not train"):
        _bisect(_planted(8, 0.05), failing=("c15",))


def test_a_merge_is_the_culprit_only_if_none_of_its_parents_is() -> None:
    # a - b - d - e, and a - c - d: the branches meet in d.
    parents = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c"), "e": ("d",)}
    for slow, expected in (({"c", "d", "e"}, "c"), ({"d", "e"}, "d"), ({"e"}, "e")):
        ratios = {name: 1.05 if name in slow else 1.0 for name in parents}
        measure, _ = _simulate(ratios, noise=0.05)
        culprit = bisect_by_time(_history(parents), measure, threshold=0.02, print_line=_silent)
        assert culprit.suspects == (expected,)


def test_halving_takes_the_logarithm_of_the_number_of_commits() -> None:
    names = [f"c{number}" for number in range(1001)]
    halving, steps = Halving(_history(linear(names))), 0
    while (name := halving.choose()) is not None:
        steps += 1
        if int(name[1:]) < 777:
            halving.note_good(name)
        else:
            halving.note_bad(name)
    assert halving.suspects == ["c777"]
    assert steps <= 10


def test_a_planted_operator_is_found_by_counters_alone() -> None:
    counted: list[str] = []

    def count(name: str) -> dict[str, int]:
        counted.append(name)
        return {"operators": 101 if int(name[1:]) >= 11 else 100}

    changes, skipped = bisect_by_counters(_history(linear(NAMES)), count, print_line=_silent)
    assert [(change.suspects, change.parent) for change in changes] == [(("c11",), "c10")]
    assert not skipped
    assert len(counted) == len(set(counted)) <= 6


def test_every_commit_that_changed_a_counter_is_found() -> None:
    def count(name: str) -> dict[str, int]:
        number = int(name[1:])
        if number == 5:
            raise CannotMeasure("too old")
        return {"operators": 100 + (number >= 4) + (number >= 12)}

    changes, skipped = bisect_by_counters(_history(linear(NAMES)), count, print_line=_silent)
    assert [change.suspects for change in changes] == [("c4",), ("c12",)]
    assert set(skipped) <= {"c5"}


@pytest.mark.parametrize(
    ("parents", "added", "expected"),
    [
        # Two branches change different counters; their merge changes none by itself.
        ({"a": "g", "b": "g", "m": "a b"}, {"a": "flops", "b": "bytes"}, "a b"),
        # Both change the same one.
        ({"a": "g", "b": "g", "m": "a b"}, {"a": "flops", "b": "flops"}, "a b"),
        ({"a": "g", "b": "g", "m": "a b"}, {"a": "flops", "b": "bytes", "m": "calls"}, "a b m"),
        ({"a": "g", "b": "g", "m": "a b"}, {"m": "flops"}, "m"),
        # A branch of several commits, whose merge is followed by others.
        (
            {"a": "g", "b": "g", "c": "b", "d": "c", "m": "a d", "n": "m", "o": "n"},
            {"c": "flops", "n": "bytes"},
            "c n",
        ),
        # The branch merges its base before it is merged.
        (
            {"a": "g", "b": "g", "c": "b a", "d": "c", "e": "a", "m": "e d"},
            {"a": "flops", "d": "bytes", "e": "calls"},
            "a d e",
        ),
        # Three branches meet in one merge.
        (
            {"a": "g", "b": "g", "c": "g", "m": "a b c"},
            {"a": "flops", "b": "bytes", "c": "calls"},
            "a b c",
        ),
    ],
)
def test_commits_on_every_branch_are_found_by_counters(
    parents: dict[str, str], added: dict[str, str], expected: str
) -> None:
    history = _history({"g": (), **{name: tuple(text.split()) for name, text in parents.items()}})
    ancestors = find_ancestors(history)

    def count(name: str) -> dict[str, object]:
        totals = {"flops": 100, "bytes": 100}
        calls = {}
        for other in ancestors[name]:
            if (counter := added.get(other)) == "calls":
                calls[other] = 1
            elif counter:
                totals[counter] += 1
        return {**totals, "operator_names": calls}

    changes, _ = bisect_by_counters(history, count, print_line=_silent)
    assert [change.suspects for change in changes] == [(name,) for name in expected.split()]


@pytest.mark.parametrize(
    ("failing", "expected"),
    [("b", [("a",), ("b", "c")]), ("c", [("a",), ("c", "m")]), ("m", [("a",), ("c",)])],
)
def test_changes_beside_commits_that_cannot_be_counted_are_ranges(
    failing: str, expected: list[tuple[str, ...]]
) -> None:
    # g - a - m - n, and g - b - c - m: a adds FLOPs, and c adds bytes.
    history = _history(
        {"g": (), "a": ("g",), "b": ("g",), "c": ("b",), "m": ("a", "c"), "n": ("m",)}
    )

    def count(name: str) -> dict[str, int]:
        if name == failing:
            raise CannotMeasure("too old")
        return {"flops": 1 + (name in "amn"), "bytes": 1 + (name in "cmn")}

    changes, skipped = bisect_by_counters(history, count, print_line=_silent)
    assert [change.suspects for change in changes] == expected
    assert skipped == {failing: "too old"}


def test_equal_counters_are_nothing_to_bisect() -> None:
    changes, _ = bisect_by_counters(
        _history(linear(NAMES)), lambda name: {"operators": 1}, print_line=_silent
    )
    assert changes == []


def test_versions_of_a_package_are_candidates_in_their_order() -> None:
    history = list_versions("torch", ("2.12.0", "2.13.0", "2.14.1"))
    assert (history.good, history.bad) == ("2.12.0", "2.14.1")
    assert history.titles["2.13.0"] == "torch 2.13.0"
    with pytest.raises(ValueError, match=r"names 2\.12\.0 twice"):
        list_versions("torch", ("2.12.0", "2.13.0", "2.12.0"))
