"""Tests which ordered samples enclose the median."""

from unitransformer.stats.ranks import interval_rank


def test_an_interval_of_95_percent_takes_six_samples() -> None:
    # The median is outside of all six with a probability of 2 / 2**6, which is 3 %.
    assert [interval_rank(n, 0.95) for n in (1, 5, 6, 8, 9, 20)] == [None, None, 1, 1, 2, 6]


def test_a_higher_confidence_takes_more_samples() -> None:
    # 2 / 2**10 is 0.2 % and 2 / 2**11 is 0.1 %.
    assert [interval_rank(n, 0.999) for n in (10, 11)] == [None, 1]
