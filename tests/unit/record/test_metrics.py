"""Tests metrics of the steady steps of a launch, on hand-made samples."""

from collections.abc import Sequence

import pytest

from unitransformer.record.metrics import (
    StepMetrics,
    compute_metrics,
    format_flops_rate,
    format_share,
    format_time_shares,
)
from unitransformer.stats.steady_state import SteadyState

STEPS = 12
STEADY = SteadyState(start=2)
PARTS = {"cpu_s": 0.1, "data_s": 0.01, "forward_backward_s": 0.05, "optimizer_s": 0.02}


def read(steady: SteadyState = STEADY, **optional: Sequence[float | None]) -> StepMetrics:
    """Returns metrics of steps of 100 ms with 10 units each, and 20 ms in each optional part."""
    samples = {name: [seconds] * STEPS for name, seconds in PARTS.items()} | optional
    metrics = compute_metrics([0.1] * STEPS, samples, steady, segment_starts=[0], units_per_step=10)
    assert metrics is not None
    return metrics


def test_gaps_between_steps_lower_the_mean_rate_and_not_the_median() -> None:
    # Ten steady steps of 100 ms with nine gaps of 50 ms.
    stopped = read(between_steps_s=[None, *[0.05] * (STEPS - 1)])
    assert stopped.units_per_s == read().units_per_s == 100
    assert read().mean_units_per_s == pytest.approx(100)
    assert stopped.mean_units_per_s == pytest.approx(100 / 1.45)
    assert stopped.between_steps_share == pytest.approx(0.45 / 1.45)


def test_gaps_next_to_unsteady_steps_are_excluded() -> None:
    between_s = [None, *[0.0] * (STEPS - 1)]
    between_s[5] = between_s[6] = 3.0  # a profiler starts before step 5 and writes after it
    traced = read(SteadyState(start=2, left_out=(5,)), between_steps_s=between_s)
    assert traced.between_steps_share == 0
    assert read(between_steps_s=between_s).mean_units_per_s == pytest.approx(100 / 7)


def test_waiting_is_a_part_of_communication() -> None:
    actual = read(communication_s=[0.02] * STEPS, min_communication_s=[0.005] * STEPS)
    assert sum(actual.shares.values()) == pytest.approx(1)
    assert actual.shares["communication_s"] == pytest.approx(0.2)
    assert actual.waiting_share == pytest.approx(0.15)
    assert format_time_shares(actual.as_dict()) == (
        "waiting for data 10.0%, forward and backward 50.0%, optimizer 20.0%, "
        "exposed communication 20.0%, 15.0% of the step waiting for the slowest rank"
    )


def test_one_missing_steady_sample_makes_the_share_missing() -> None:
    gap = [0.02] * (STEPS - 1) + [None]
    actual = read(communication_s=gap, min_communication_s=gap, between_steps_s=gap)
    assert actual == read()
    assert actual.as_dict().keys() == read().as_dict().keys()
    assert "communication_share" not in actual.as_dict()


def test_samples_before_the_steady_state_may_be_missing() -> None:
    series = [None, None, *[0.02] * (STEPS - 2)]
    assert read(communication_s=series).shares["communication_s"] == pytest.approx(0.2)


def test_values_derived_from_the_rate_have_its_relative_interval() -> None:
    # 100 units per second, 90 to 110.
    metrics = {"units_per_s": 100.0, "low_units_per_s": 90.0, "high_units_per_s": 110.0}
    assert format_flops_rate(2e12, metrics) == "2.00 TFLOP/s (1.80 to 2.20)"
    assert format_flops_rate(995e9, metrics) == "995 GFLOP/s (896 to 1094)"
    assert format_share(0.5, metrics) == "50.0% (45.0% to 55.0%)"
    none = metrics | {"low_units_per_s": None, "high_units_per_s": None}
    assert (format_flops_rate(2e12, none), format_share(0.5, none)) == ("2 TFLOP/s", "50.0%")
