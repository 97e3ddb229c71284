"""Tests the split of variance within and between launches."""

import math
import random

import pytest

from unitransformer.stats.comparisons import LaunchVariance, describe_launch, split_variance


def make_launches(
    number: int, *, between: float, within: float, num_steps: int = 100, seed: int = 0
) -> list[list[float]]:
    """Steps around 1 s; `between` and `within` are standard deviations of logarithms."""
    rng = random.Random(seed)
    launches = []
    for _ in range(number):
        level = rng.gauss(0, between)
        launches.append([math.exp(level + rng.gauss(0, within)) for _ in range(num_steps)])
    return launches


def split_steps(launches: list[list[float]]) -> LaunchVariance:
    return split_variance([describe_launch(steps) for steps in launches])


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
