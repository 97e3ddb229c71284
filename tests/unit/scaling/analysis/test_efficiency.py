"""Tests scaling curves, their efficiency, and where time was lost, on hand-made records."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from scaling.analysis.efficiency import Curve, Estimate, Scaling, find_curves, pooled_rate, ratio
from scaling.analysis.time_lost import Slowest, explain
from scaling.store.run import Run
from tests.builders.records import make_crashed, make_record, make_run
from tests.builders.runs import CLEAN, clocked, make_spread, strong, traced, weak


def only(runs: Sequence[Run]) -> Curve:
    (curve,) = find_curves(runs)
    return curve


def efficiencies(curve: Curve) -> dict[int, float]:
    return {point.devices: curve.efficiency(point).value for point in curve.points}


# ---------------------------------------------------------------------------------- curves


@pytest.mark.parametrize(
    ("scaling", "runs"),
    [
        ("strong", [strong(0.1, 1), strong(0.05, 2), strong(0.03125, 4)]),
        ("weak", [weak(0.1, 1), weak(0.1, 2), weak(0.125, 4)]),
    ],
)
def test_efficiency_is_the_rate_per_device_relative_to_the_baseline(
    scaling: Scaling, runs: list[Run]
) -> None:
    curve = only(runs)
    assert curve.scaling == scaling
    assert efficiencies(curve) == pytest.approx({1: 1.0, 2: 1.0, 4: 0.8})
    assert curve.speedup(curve.points[2]).value == pytest.approx(3.2)


def test_the_baseline_is_the_smallest_device_count() -> None:
    curve = only([strong(0.04, 8), strong(0.05, 4), strong(0.1, 2)])
    assert (curve.baseline.devices, curve.baseline.middle.name) == (2, "runs/2.json")
    assert efficiencies(curve) == pytest.approx({2: 1.0, 4: 1.0, 8: 0.625})


def test_a_point_counts_the_devices_of_all_its_nodes() -> None:
    runs = [weak(0.1, 2), make_spread(0.1, "b", strategy="ddp", devices=2, num_nodes=2)]
    assert efficiencies(only(runs)) == pytest.approx({2: 1.0, 4: 1.0})


def test_variances_of_logarithms_add_up() -> None:
    three, four = (Estimate(value=1, low=math.exp(-h), high=math.exp(h)) for h in (0.3, 0.4))
    result = ratio(three.times(6), four.times(2))
    assert result.value == 3
    assert (result.low, result.high) == pytest.approx((3 * math.exp(-0.5), 3 * math.exp(0.5)))


def test_a_missing_interval_leaves_its_reason() -> None:
    curve = only([strong(0.1, 1, steps=10), strong(0.05, 2, noise=0.1)])
    result = curve.efficiency(curve.points[1])
    assert (result.low, result.high) == (None, None)
    assert result.reason == "10 samples, an interval needs 50"


def test_repeats_are_one_point_with_the_interval_over_launches() -> None:
    repeats = [strong(s, 2, f"runs/2-{s}.json", noise=0.02) for s in (0.05, 0.051, 0.052)]
    curve = only([strong(0.1, 1, noise=0.02), *repeats])
    point = curve.points[1]
    assert (len(curve.points), len(point.runs)) == (2, 3)
    assert point.middle is repeats[1]
    alone = pooled_rate(repeats[1:2])
    assert point.rate.value == pytest.approx(alone.value, rel=0.01)
    assert point.rate.log_half_width is not None
    assert alone.log_half_width is not None
    assert point.rate.log_half_width > alone.log_half_width, "launches differ by more than steps"


def test_strategy_single_is_the_baseline_of_a_strategy_without_its_own_with_a_remark() -> None:
    single = make_spread(0.1, "runs/single.json", strategy="single", batch_size=8)
    curve = only([single, strong(0.05, 2)])
    assert (curve.strategy, curve.baseline.runs) == ("ddp", (single,))
    assert curve.remarks == ("1 device is strategy single: ddp was not measured on one",)
    ddp = strong(0.11, 1)
    curve = only([single, ddp, strong(0.05, 2)])
    assert (curve.baseline.runs, curve.remarks) == ((ddp,), ())


def test_the_fastest_batch_split_represents_its_device_count_with_a_remark() -> None:
    in_parts = strong(0.06, 2, "runs/parts.json", batch_size=2, accumulate=2)
    curve = only([strong(0.1, 1), strong(0.05, 2), in_parts])
    assert [run.name for run in curve.points[1].runs] == ["runs/2.json"]
    assert curve.remarks == (
        "2 devices: the fastest of 2 batch splits is shown, "
        "4 per device x 1 micro-batches x 2 devices",
    )


def test_a_curve_lists_differing_conditions() -> None:
    assert only([strong(0.1, 1), strong(0.05, 2)]).differing_conditions == ()
    other = strong(0.05, 2, changes={"code": CLEAN | {"commit": "fedcba"}})
    (line,) = only([strong(0.1, 1), other]).differing_conditions
    assert line == "commit differ: 0123456789abcdef (record 1); fedcba (record 2)"


def test_different_or_unsteady_runs_are_on_no_curve() -> None:
    one = strong(0.1, 1)
    assert find_curves([one, strong(0.05, 2, seed=1)]) == []
    assert find_curves([one, strong(0.05, 2, precision="bf16-mixed")]) == []
    assert find_curves([one, strong(0.05, 2, strategy="fsdp")]) == []
    assert find_curves([one, strong(0.05, 2, steps=3)]) == []
    assert find_curves([one, make_run(make_crashed())]) == []


def test_runs_of_several_configs_have_no_pooled_rate() -> None:
    with pytest.raises(ValueError, match="runs have 2 configs; give the launches of one"):
        pooled_rate([strong(0.1, 1), strong(0.05, 2)])


# ---------------------------------------------------------------------------------- the loss


def test_an_unsharded_optimizer_explains_all_time_lost() -> None:
    # 10 + 60 + 30 ms on one device; 5 + 30 + 30 ms on two, where 50 ms would be ideal.
    one, two = strong(0.1, 1), strong(0.065, 2, parts=(5 / 65, 30 / 65))
    loss = explain(one, two)
    assert loss.share == pytest.approx(15 / 65)
    assert loss.parts == pytest.approx(
        {"input": 0.0, "optimizer": 15 / 65, "forward and backward": 0.0}, abs=1e-12
    )


def test_a_weak_scaling_step_is_compared_with_the_baseline_step() -> None:
    # 10 + 60 + 30 ms, then 40 + 60 + 25 ms: input loses 30 of 125, the optimizer gains 5.
    loss = explain(weak(0.1, 1), weak(0.125, 2, parts=(40 / 125, 25 / 125)))
    assert loss.share == pytest.approx(0.2)
    assert (loss.parts["input"], loss.parts["optimizer"]) == pytest.approx((0.24, -0.04))


def test_communication_is_separated_only_with_a_trace() -> None:
    one = strong(0.1, 1)
    untraced = explain(one, strong(0.08, 2))
    assert "exposed communication" not in untraced.parts
    assert any("`--trace` on both runs" in remark for remark in untraced.caveats)
    with_trace = explain(one, strong(0.08, 2, changes=traced(0.25, 0.1)))
    assert with_trace.parts["exposed communication"] == pytest.approx(0.25)
    before, after = (loss.parts["forward and backward"] for loss in (untraced, with_trace))
    assert after == pytest.approx(before - 0.25)
    assert with_trace.traced is not None
    assert with_trace.traced.idle == pytest.approx(0.1)


def test_an_untraced_baseline_of_two_devices_leaves_communication_missing() -> None:
    loss = explain(strong(0.1, 2), strong(0.06, 4, changes=traced(0.25, 0.1)))
    assert "exposed communication" not in loss.parts


@pytest.mark.parametrize("changes", [{}, traced(0.25, 0.1)])
def test_parts_add_up_to_the_time_lost_on_the_curve(changes: dict[str, Any]) -> None:
    one, two = strong(0.1, 1, noise=0.3), strong(0.07, 2, noise=0.3, changes=changes)
    loss, curve = explain(one, two), only([one, two])
    assert math.fsum(loss.parts.values()) == pytest.approx(loss.share)
    assert loss.share == pytest.approx(1 - curve.efficiency(curve.points[1]).value)


def test_the_slowest_rank_is_named_and_its_cost_is_not_guessed() -> None:
    loss = explain(strong(0.1, 1), strong(0.05, 2, slowest=(1, 1, 1, 0)))
    assert loss.slowest == Slowest(rank=1, share=0.75, chance=0.5)


def test_communication_and_waiting_come_from_the_clock_if_recorded() -> None:
    # 80 ms: 16 of communication on the slowest rank, of which 12 are the minimum over ranks.
    one, two = strong(0.1, 1), strong(0.08, 2, changes=traced(0.25, 0.1))
    samples = two.record["samples"] | clocked(0.016, 0.012)
    two = make_run(two.record | {"samples": samples}, two.name)
    loss = explain(one, two)
    assert loss.parts["exposed communication"] == pytest.approx(0.15)
    assert loss.parts["waiting for the slowest rank"] == pytest.approx(0.05)
    assert math.fsum(loss.parts.values()) == pytest.approx(loss.share)
    assert loss.traced is None
    assert not any("trace" in caveat for caveat in loss.caveats)
    untraced = explain(strong(0.1, 2), two)
    assert untraced.parts.keys() == {"input", "optimizer", "forward and backward"}


def test_time_lost_needs_two_steady_runs_of_one_recipe() -> None:
    with pytest.raises(ValueError, match=r"run runs/2.json has no steady state; measure it"):
        explain(strong(0.1, 1), strong(0.05, 2, steps=3))
    with pytest.raises(ValueError, match="run is of recipe vit and baseline of gpt"):
        explain(strong(0.1, 1), make_run(make_record("vit")))
