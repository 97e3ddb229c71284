"""Tests ratios of paired runs, and the split of variance within and between launches."""

import math
import random

import pytest

from unitransformer.stats.comparisons import (
    LaunchVariance,
    describe_launch,
    minimum_detectable_effect,
    paired_ratio,
    split_variance,
)
from unitransformer.stats.intervals import MedianInterval


def make_figures(low: float | None, high: float | None) -> MedianInterval:
    return MedianInterval(median=1.0, mad=0.0, count=50, low=low, high=high, block_length=4)


def make_launches(
    number: int, *, between: float, within: float, num_steps: int = 100, seed: int = 0
) -> list[list[float]]:
    """Steps around 1 s; `between` and `within` are standard deviations of logarithms."""
    drawn = random.Random(seed)
    launches = []
    for _ in range(number):
        level = drawn.gauss(0, between)
        launches.append([math.exp(level + drawn.gauss(0, within)) for _ in range(num_steps)])
    return launches


def split_steps(launches: list[list[float]]) -> LaunchVariance:
    return split_variance([describe_launch(steps) for steps in launches])


def test_a_slowdown_of_both_runs_of_a_pair_cancels() -> None:
    drawn = random.Random(0)
    a = [drawn.uniform(1, 5) for _ in range(80)]
    ratio = paired_ratio(a, [1.05 * seconds for seconds in a])
    assert ratio.median == pytest.approx(1.05)
    assert (ratio.low, ratio.high) == (pytest.approx(1.05), pytest.approx(1.05))
    assert ratio.mad == pytest.approx(0, abs=1e-12)


def test_the_ratio_the_other_way_round_is_the_inverse() -> None:
    drawn = random.Random(1)
    a, b = ([drawn.lognormvariate(0, 0.1) for _ in range(81)] for _ in range(2))
    there, back = paired_ratio(a, b), paired_ratio(b, a)
    assert there.median == pytest.approx(1 / back.median)
    assert there.low is not None
    assert back.high is not None
    assert there.low == pytest.approx(1 / back.high, rel=0.01)


def test_the_interval_of_equal_pairs_contains_1_in_19_of_20_series() -> None:
    drawn = random.Random(2)
    inside = actual = 0
    for _ in range(200):
        a, b = ([drawn.lognormvariate(0, 0.1) for _ in range(60)] for _ in range(2))
        ratio = paired_ratio(a, b)
        if ratio.low is None or ratio.high is None:
            continue  # by chance they look autocorrelated
        actual += 1
        inside += ratio.low <= 1 <= ratio.high
    assert actual >= 190
    assert inside / actual >= 0.92


def test_too_few_pairs_have_no_interval_and_no_detectable_effect() -> None:
    ratio = paired_ratio([1.0] * 10, [2.0] * 10)
    assert (ratio.median, ratio.low) == (pytest.approx(2), None)
    assert minimum_detectable_effect(ratio) is None


def test_invalid_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 2 samples and b 1"):
        paired_ratio([1.0, 1.0], [1.0])
    with pytest.raises(ValueError, match=r"b\[0\] is 0\.0"):
        paired_ratio([1.0], [0.0])


def test_the_detectable_effect_is_nearly_twice_the_half_interval() -> None:
    # 1 + 1.645 / 1.960 = 1.839 half-widths of 1 % each.
    effect = minimum_detectable_effect(make_figures(math.exp(-0.01), math.exp(0.01)))
    assert effect == pytest.approx(math.expm1(0.01839), rel=1e-3)


def test_detection_with_an_even_chance_needs_half_the_interval() -> None:
    figures = make_figures(math.exp(-0.01), math.exp(0.01))
    assert minimum_detectable_effect(figures, power=0.5) == pytest.approx(math.expm1(0.01))
    with pytest.raises(ValueError, match="power is 1"):
        minimum_detectable_effect(figures, power=1)


def test_a_slowdown_of_the_detectable_effect_is_detected_19_times_in_20() -> None:
    drawn = random.Random(3)
    base = [drawn.lognormvariate(0, 0.1) for _ in range(100)]
    effect = minimum_detectable_effect(paired_ratio([1.0] * 100, base))
    assert effect is not None
    found = 0
    for _ in range(200):
        slower = [drawn.lognormvariate(math.log1p(effect), 0.1) for _ in range(100)]
        ratio = paired_ratio([1.0] * 100, slower)
        found += ratio.low is not None and ratio.low > 1
    assert found >= 170  # the effect is estimated from a single sample


# ------------------------------------------------------------------------------ launches


def test_launches_with_different_medians_have_variance_between_them() -> None:
    split = split_steps(make_launches(20, between=0.05, within=0.02))
    assert split.between == pytest.approx(0.05, rel=0.4)
    # A median of 100 independent steps: sqrt(pi / 2) * 0.02 / sqrt(100) = 0.0025.
    assert split.within == pytest.approx(0.0025, rel=0.3)


def test_launches_with_equal_medians_have_almost_no_variance_between_them() -> None:
    between = [
        split_steps(make_launches(5, between=0, within=0.02, seed=seed)).between
        for seed in range(20)
    ]
    assert sum(value == 0 for value in between) >= 5  # of 20
    assert max(value or 0 for value in between) < 0.005


def test_the_interval_over_launches_covers_the_true_median_19_times_in_20() -> None:
    inside = actual = 0
    for seed in range(100):
        split = split_steps(make_launches(4, between=0.05, within=0.02, num_steps=60, seed=seed))
        if split.low is None or split.high is None:
            continue
        actual += 1
        inside += split.low <= 1 <= split.high
    assert actual >= 90
    assert inside / actual >= 0.9


def test_two_launches_have_a_wide_interval() -> None:
    split = split_steps(make_launches(2, between=0.05, within=0.02, seed=1))
    assert split.low is not None
    assert split.high is not None
    assert split.high / split.low > 1.3
    assert len(split.medians) == 2


def test_a_launch_too_short_for_an_interval_has_no_variance_split() -> None:
    split = split_steps([[1.0, 2.0, 3.0], [2.0] * 3])
    assert split == LaunchVariance(
        medians=(2.0, 2.0),
        within=None,
        between=None,
        median=None,
        low=None,
        high=None,
        reason="launch 1: 3 samples, an interval needs 50",
    )


def test_steps_without_variance_have_no_variance_split() -> None:
    split = split_steps([[1.0] * 60, [2.0] * 60])
    assert split.between is None
    assert split.reason is not None
    assert "the same time" in split.reason


def test_a_single_launch_is_refused() -> None:
    with pytest.raises(ValueError, match="launches holds 1; repeat the launch"):
        split_steps([[1.0] * 60])
    with pytest.raises(ValueError, match="a launch holds no steps"):
        describe_launch([])
