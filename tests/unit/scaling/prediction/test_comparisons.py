"""Tests comparisons of predictions: a ratio is surer than two intervals, and adds up."""

import math
from dataclasses import replace

import pytest

from scaling.prediction.comparisons import (
    format_lag,
    format_range,
    format_saving,
    format_shares,
    hours_ratio,
    step_shares,
)
from scaling.prediction.fit_file import default_model
from scaling.prediction.fitting import SCATTER, SHARES
from scaling.prediction.hardware import load_hardware
from scaling.prediction.options import build_configs
from scaling.prediction.predict import Prediction, predict

NODE, MODEL = load_hardware("h100-sxm-8"), default_model()
EQUAL_RUNS = math.sqrt(2) * MODEL.deviations * SCATTER  # by which two runs differ


def predict_on(devices: int, strategy: str, hardware: str = "h100-sxm-8") -> Prediction:
    node = load_hardware(hardware)
    axes = {"size": ["6.7b"], "strategy": [strategy], "batch-size": ["2"]}
    (config,), _ = build_configs("gpt", (devices,), axes, node)
    return predict(config, node, MODEL)


def half(low: float, high: float) -> float:
    """Returns half of an interval, as a logarithm."""
    return math.log(high / low) / 2


def test_a_ratio_is_surer_than_two_intervals_and_no_surer_than_equal_runs() -> None:
    one, other, far = predict_on(8, "fsdp"), predict_on(8, "zero2"), predict_on(4096, "zero3")
    ratio = hours_ratio(one, other, MODEL)
    assert ratio.value == pytest.approx(one.step_s.value / other.step_s.value)  # of equal batches
    alone = math.hypot(*(half(p.step_s.low, p.step_s.high) for p in (one, other)))
    assert EQUAL_RUNS < half(ratio.low, ratio.high) < alone
    distant = hours_ratio(one, far, MODEL)
    assert half(distant.low, distant.high) > half(ratio.low, ratio.high)
    same = hours_ratio(one, one, MODEL)
    assert half(same.low, same.high) == pytest.approx(EQUAL_RUNS)
    turned = hours_ratio(other, one, MODEL)
    assert (turned.low, turned.high) == pytest.approx((1 / ratio.high, 1 / ratio.low))


def test_rows_of_an_unseen_gpu_are_unsure_alike() -> None:
    one, other = predict_on(8, "fsdp", "l40s-8"), predict_on(8, "zero2", "l40s-8")
    ratio = hours_ratio(one, other, MODEL)
    assert half(ratio.low, ratio.high) < half(one.step_s.low, one.step_s.high) / 2


def test_a_measured_row_has_the_error_of_its_measurement() -> None:
    one, other = predict_on(8, "fsdp"), predict_on(8, "zero2")
    time = replace(other.time, provenance="measured", low_s=0.99, high_s=1.01)
    ratio = hours_ratio(one, replace(other, time=time), MODEL)
    expected = math.hypot(half(one.step_s.low, one.step_s.high), half(0.99, 1.01))
    assert half(ratio.low, ratio.high) == pytest.approx(expected)


def test_the_shares_of_a_step_are_in_their_ranges() -> None:
    found = predict_on(4096, "fsdp")
    shares = dict(zip(SHARES, step_shares(found, MODEL), strict=True))
    hidden = shares.pop("hidden_communication_s")
    assert sum(share.value for share in shares.values()) == pytest.approx(1.0)
    for share in (hidden, *shares.values()):
        assert 0 < share.low < share.value < share.high < 1
    alone = predict_on(1, "single")
    exposed = step_shares(alone, MODEL)[SHARES.index("exposed_communication_s")]
    assert (exposed.low, exposed.value, exposed.high) == (0, 0, 0)
    assert alone.time.provenance == "extrapolated"
    assert list(format_shares(alone, MODEL))[1] == "0%"


def test_only_what_is_extrapolated_is_compared_in_ranges() -> None:
    near, next_to_it, far = predict_on(8, "fsdp"), predict_on(8, "ddp"), predict_on(4096, "fsdp")
    assert [p.time.provenance for p in (near, far)] == ["fitted", "extrapolated"]
    lag = hours_ratio(next_to_it, near, MODEL)
    assert format_lag(next_to_it, near, MODEL) == f"{lag.value - 1:.0%} slower"
    assert format_lag(near, near, MODEL) == "as fast"
    saving = hours_ratio(near, far, MODEL)
    low, high = 1 - saving.high * 8 / 4096, 1 - saving.low * 8 / 4096
    assert format_saving(near, far, MODEL) == f"{low:.0%} to {high:.0%} less"
    assert format_saving(near, near, MODEL) == "as much"
    # A row on 8 devices is slower than one on 4,096 by at least so much.
    ratio = hours_ratio(near, far, MODEL)
    assert format_lag(near, far, MODEL) == f"{ratio.low - 1:.0%} to {ratio.high - 1:.0%} slower"


def test_a_range_on_both_sides_of_zero_says_so() -> None:
    assert format_range(0.02, 0.09, "slower", "faster") == "2% to 9% slower"
    assert format_range(-0.09, -0.02, "slower", "faster") == "2% to 9% faster"
    assert format_range(-0.02, 0.09, "less", "more") == "between 2% more and 9% less"
