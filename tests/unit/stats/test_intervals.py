"""Tests median, spread and interval, and the coverage of the interval."""

import math
import random
import re
import time
from statistics import NormalDist

import numpy as np
import pytest

from unitransformer.stats.autocorrelation import block_length, long_run_variance
from unitransformer.stats.intervals import describe, mean_rate, t_quantile

SCATTER, SPIKE, SPIKE_SHARE = 0.1, 3.0, 0.05


def make_series(num_series: int, count: int, *, rho: float, seed: int) -> np.ndarray:
    """Lognormal AR(1) step times around 1 s; one in twenty is three times as long.

    Shape: (num_series, count).
    """
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((num_series, count))
    for step in range(1, count):
        noise[:, step] = rho * noise[:, step - 1] + math.sqrt(1 - rho**2) * noise[:, step]
    return np.exp(SCATTER * noise) * np.where(rng.random(noise.shape) < SPIKE_SHARE, SPIKE, 1)


def true_median() -> float:
    """The true median of the mixture of plain and tripled steps."""
    normal = NormalDist(sigma=SCATTER)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        plain, tripled = normal.cdf(middle), normal.cdf(middle - math.log(SPIKE))
        is_above = (1 - SPIKE_SHARE) * plain + SPIKE_SHARE * tripled > 0.5
        low, high = (low, middle) if is_above else (middle, high)
    return math.exp(low)


@pytest.mark.parametrize(
    ("count", "rho"), [(50, 0.5), (100, 0.5), (200, 0.5), (400, 0.5), (100, 0.0), (200, 0.8)]
)
def test_the_interval_covers_the_median_of_93_to_97_in_100_series(count: int, rho: float) -> None:
    median = true_median()
    actual = [describe(list(series)) for series in make_series(1000, count, rho=rho, seed=count)]
    bounds = [(f.low, f.high) for f in actual if f.low is not None and f.high is not None]
    covered = sum(low <= median <= high for low, high in bounds)
    assert len(bounds) >= 900
    assert 0.93 <= covered / len(bounds) <= 0.97


def test_median_deviation_and_count_include_outliers() -> None:
    interval = describe([3.0, 1.0, 2.0, 100.0, 2.0])
    assert (interval.median, interval.mad, interval.count) == (2.0, 1.0, 5)


def test_too_few_samples_have_no_interval_but_a_reason() -> None:
    interval = describe([1.0] * 49)
    assert (interval.low, interval.high, interval.block_length) == (None, None, None)
    assert interval.relative_width is None
    assert interval.reason == "49 samples, an interval needs 50"


def test_strongly_autocorrelated_samples_have_no_interval() -> None:
    interval = describe([1.0 + 0.01 * step for step in range(60)])
    assert interval.low is None
    assert interval.reason is not None
    assert re.fullmatch(r"autocorrelated over \d+ steps; needs \d+ samples", interval.reason)


def test_the_same_samples_always_have_the_same_interval() -> None:
    (series,) = make_series(1, 100, rho=0.5, seed=1)
    random.seed(1)
    first = describe(list(series))
    random.seed(2)
    assert describe(list(series)) == first
    assert first.reason is None


def test_the_interval_lies_around_the_median_and_scales_with_the_samples() -> None:
    (series,) = make_series(1, 200, rho=0.5, seed=2)
    one, thousand = describe(list(series)), describe(list(1000 * series))
    assert one.low is not None
    assert one.high is not None
    assert one.low < one.median < one.high
    assert thousand.low == pytest.approx(1000 * one.low)
    assert thousand.relative_width == pytest.approx(one.relative_width)


def test_a_higher_confidence_gives_a_wider_interval() -> None:
    (series,) = make_series(1, 200, rho=0.5, seed=3)
    usual, strict = (describe(list(series), confidence=share) for share in (0.95, 0.99))
    assert usual.relative_width is not None
    assert strict.relative_width is not None
    assert 1.1 * usual.relative_width < strict.relative_width < 2 * usual.relative_width


def test_four_times_the_samples_halve_the_interval() -> None:
    def mean_width(count: int) -> float:
        many = [describe(list(one)) for one in make_series(50, count, rho=0.5, seed=4)]
        return sum(interval.relative_width or 0 for interval in many) / 50

    assert mean_width(1600) / mean_width(400) == pytest.approx(0.5, rel=0.1)


def test_the_interval_of_equal_samples_has_no_width() -> None:
    assert describe([0.25] * 50).relative_width == 0


def test_ten_thousand_samples_take_well_under_a_second_of_processor_time() -> None:
    (series,) = make_series(1, 10_000, rho=0.5, seed=5)
    samples = list(series)
    spent = []
    for _ in range(3):  # the best of three: the machine may be busy
        begun = time.process_time()
        describe(samples)
        spent.append(time.process_time() - begun)
    assert min(spent) < 1


def test_bootstrap_blocks_grow_with_autocorrelation() -> None:
    def mean_length(rho: float) -> float:
        return sum(block_length(list(one)) for one in make_series(50, 400, rho=rho, seed=6)) / 50

    # 8 is the cube root of 400, rounded up.
    assert 8 <= mean_length(0.0) < mean_length(0.5) < mean_length(0.8)


def test_the_long_run_variance_of_ar_1_is_three_times_its_variance() -> None:
    # (1 + rho) / (1 - rho) = 1.5 / 0.5
    logs = np.log(make_series(1, 20_000, rho=0.5, seed=7)[0])
    plain = logs[logs < 0.5] / SCATTER  # without the spikes
    assert long_run_variance(plain - plain.mean()) == pytest.approx(3, rel=0.2)


def test_samples_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="samples is empty"):
        describe([])
    with pytest.raises(ValueError, match=r"samples\[1\] is nan"):
        describe([1.0, math.nan])
    with pytest.raises(ValueError, match=r"confidence is 95"):
        describe([1.0], confidence=95)


def test_the_mean_rate_includes_a_stall_that_the_median_hides() -> None:
    assert mean_rate([1.0, 1.0, 1.0, 7.0], 100) == 40  # 400 units in 10 s
    with pytest.raises(ValueError, match="took no time"):
        mean_rate([1.0, 0.0], 100)


@pytest.mark.parametrize(
    ("level", "freedom", "value"),
    # From a table of Student's t.
    [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.95, 10, 1.812), (0.995, 30, 2.750), (0.5, 3, 0.0)],
)
def test_quantiles_of_student_s_t_are_those_of_the_tables(
    level: float, freedom: float, value: float
) -> None:
    assert t_quantile(level, freedom) == pytest.approx(value, abs=5e-4)
