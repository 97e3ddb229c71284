"""Tests ratios of pairs and their intervals."""

import random

import pytest

from scaling.peers.ratios import Ratio, paired_ratio, pool_launches


def test_what_slows_both_of_a_pair_cancels() -> None:
    ratio = paired_ratio([2.0, 20.0, 2.0, 200.0, 2.0, 2.0], [1.0, 10.0, 1.0, 100.0, 1.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (2.0, 2.0, 2.0, 6)


def test_an_interval_takes_six_pairs() -> None:
    six = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6)
    assert (six.low, six.high) == (1.0, 6.0)
    ratio = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (ratio.median, ratio.low, ratio.high) == (pytest.approx(3.0), None, None)


def test_an_interval_covers_the_true_median_of_at_least_95_percent() -> None:
    rng, covered = random.Random(0), 0
    for _ in range(1000):
        ratio = paired_ratio([rng.lognormvariate(0, 1) for _ in range(20)], [1.0] * 20)
        assert ratio.low is not None
        assert ratio.high is not None
        covered += ratio.low <= 1.0 <= ratio.high
    assert covered >= 935  # four standard deviations below 95 %


def draw_launch(rng: random.Random, pairs: int = 20) -> Ratio:
    """A launch 5 % off the true ratio of 1, with pairs that scatter by 2 % around it."""
    launch = rng.gauss(0, 0.05)
    return paired_ratio([rng.lognormvariate(launch, 0.02) for _ in range(pairs)], [1.0] * pairs)


def test_an_interval_over_launches_covers_what_differs_between_them() -> None:
    rng, covered = random.Random(1), 0
    for _ in range(300):
        ratio = pool_launches([draw_launch(rng) for _ in range(3)])
        assert ratio.low is not None
        assert ratio.high is not None
        assert ratio.pairs == 60
        covered += ratio.low <= 1.0 <= ratio.high
    assert covered >= 270  # four standard deviations below 95 %; that of all pairs covers 36 %


def test_one_launch_keeps_its_interval_and_a_short_one_leaves_none() -> None:
    rng = random.Random(2)
    long, short = draw_launch(rng), draw_launch(rng, pairs=5)
    assert pool_launches([long]) is long
    both = pool_launches([long, short])
    assert (both.low, both.high, both.pairs) == (None, None, 25)
    assert min(long.median, short.median) < both.median < max(long.median, short.median)
    with pytest.raises(ValueError, match="launches is empty"):
        pool_launches([])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "are not pairs"),
        ([1.0], [1.0, 2.0], "1 and 2 samples are not pairs"),
        ([0.0], [1.0], "not above 0"),
    ],
)
def test_samples_that_are_no_pairs_are_refused(
    a: list[float], b: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_ratio(a, b)
