"""Curves over device counts, and where their efficiency went, out of hand-made records."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from test_store import HOST, make_config, make_crashed, make_record, make_run

from scaling.analysis.efficiency import Curve, Estimate, Scaling, find_curves, pooled_rate, ratio
from scaling.analysis.time_lost import Slowest, explain
from scaling.store.run import Run
from unitransformer.config import ParallelConfig, to_dict

CLEAN = {"commit": "0123456789abcdef", "is_dirty": False}


def make_spread(
    step_s: float,
    name: str = "runs/a.json",
    *,
    steps: int = 60,
    noise: float = 0.0,
    parts: tuple[float, float] = (0.1, 0.3),
    slowest: Sequence[int] = (0,),
    batch_size: int = 2,
    accumulate: int = 1,
    seed: int = 0,
    changes: dict[str, Any] | None = None,
    **parallel: Any,
) -> Run:
    """A run of `steps` steady steps, spread over devices.

    Args:
        noise: a step takes up to this share longer.
        parts: shares of input and optimizer; forward and backward is the rest.
        slowest: ranks that were in turns.
    """
    drawn = random.Random(name)
    step_s_all = [0.5, 0.3] + [step_s * (1 + noise * drawn.random()) for _ in range(steps)]
    record = make_record(step_s=step_s_all)
    spread = ParallelConfig(**{"accelerator": "cpu"} | parallel)
    config = replace(
        make_config(), parallel=spread, batch_size=batch_size, accumulate=accumulate, seed=seed
    )
    shares = {"data_s": parts[0], "optimizer_s": parts[1], "forward_backward_s": 1 - sum(parts)}
    record["samples"] |= {
        part: [share * s for s in step_s_all] for part, share in shares.items()
    } | {"slowest_rank": [slowest[step % len(slowest)] for step in range(len(step_s_all))]}
    return make_run(
        record
        | {
            "config": to_dict(config),
            "world_size": spread.world_size,
            "global_batch_size": config.global_batch_size,
            "hardware": [HOST] * spread.world_size,
            "trace": [None] * spread.world_size,
            "code": CLEAN,
        }
        | (changes or {}),
        name,
    )


def strong(step_s: float, devices: int, name: str = "", **changes: Any) -> Run:
    """A global batch of 8, under DDP."""
    own: dict[str, Any] = {"strategy": "ddp", "batch_size": 8 // devices}
    return make_spread(step_s, name or f"runs/{devices}.json", devices=devices, **own | changes)


def weak(step_s: float, devices: int, **changes: Any) -> Run:
    """A batch of 2 a device, under DDP."""
    return make_spread(step_s, f"runs/{devices}.json", devices=devices, strategy="ddp", **changes)


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
def test_efficiency_is_the_rate_a_device_over_that_of_the_baseline(
    scaling: Scaling, runs: list[Run]
) -> None:
    curve = only(runs)
    assert curve.scaling == scaling
    assert efficiencies(curve) == pytest.approx({1: 1.0, 2: 1.0, 4: 0.8})
    assert curve.speedup(curve.points[2]).value == pytest.approx(3.2)


def test_the_baseline_is_the_smallest_count_there_is() -> None:
    curve = only([strong(0.04, 8), strong(0.05, 4), strong(0.1, 2)])
    assert (curve.baseline.devices, curve.baseline.middle.name) == (2, "runs/2.json")
    assert efficiencies(curve) == pytest.approx({2: 1.0, 4: 1.0, 8: 0.625})


def test_nodes_count_as_their_devices() -> None:
    runs = [weak(0.1, 2), make_spread(0.1, "b", strategy="ddp", devices=2, num_nodes=2)]
    assert efficiencies(only(runs)) == pytest.approx({2: 1.0, 4: 1.0})


def test_variances_of_logarithms_add_up() -> None:
    three, four = (Estimate(value=1, low=math.exp(-h), high=math.exp(h)) for h in (0.3, 0.4))
    found = ratio(three.times(6), four.times(2))
    assert found.value == 3
    assert (found.low, found.high) == pytest.approx((3 * math.exp(-0.5), 3 * math.exp(0.5)))


def test_an_interval_that_is_missing_leaves_its_reason() -> None:
    curve = only([strong(0.1, 1, steps=10), strong(0.05, 2, noise=0.1)])
    found = curve.efficiency(curve.points[1])
    assert (found.low, found.high) == (None, None)
    assert found.reason == "10 samples, an interval needs 50"


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


def test_single_lends_its_device_to_a_strategy_that_has_none_and_this_is_said() -> None:
    single = make_spread(0.1, "runs/single.json", strategy="single", batch_size=8)
    curve = only([single, strong(0.05, 2)])
    assert (curve.strategy, curve.baseline.runs) == ("ddp", (single,))
    assert curve.remarks == ("1 device is strategy single: ddp was not measured on one",)
    own = strong(0.11, 1)
    curve = only([single, own, strong(0.05, 2)])
    assert (curve.baseline.runs, curve.remarks) == ((own,), ())


def test_of_two_ways_to_spread_the_batch_the_fastest_stands_and_this_is_said() -> None:
    in_parts = strong(0.06, 2, "runs/parts.json", batch_size=2, accumulate=2)
    curve = only([strong(0.1, 1), strong(0.05, 2), in_parts])
    assert [run.name for run in curve.points[1].runs] == ["runs/2.json"]
    assert curve.remarks == (
        "on 2 devices the fastest of 2 ways to spread the batch stands: "
        "4 a device x 1 micro-batches x 2 devices",
    )


def test_a_curve_says_in_what_its_records_differ() -> None:
    assert only([strong(0.1, 1), strong(0.05, 2)]).apart == ()
    other = strong(0.05, 2, changes={"code": CLEAN | {"commit": "fedcba"}})
    (line,) = only([strong(0.1, 1), other]).apart
    assert line == "commit differ: 0123456789abcdef (record 1); fedcba (record 2)"


def test_what_is_not_alike_or_not_steady_is_on_no_curve() -> None:
    one = strong(0.1, 1)
    assert find_curves([one, strong(0.05, 2, seed=1)]) == []
    assert find_curves([one, strong(0.05, 2, precision="bf16-mixed")]) == []
    assert find_curves([one, strong(0.05, 2, strategy="fsdp")]) == []
    assert find_curves([one, strong(0.05, 2, steps=3)]) == []
    assert find_curves([one, make_run(make_crashed())]) == []


def test_runs_of_several_configs_have_no_rate_together() -> None:
    with pytest.raises(ValueError, match="runs have 2 configs; give the launches of one"):
        pooled_rate([strong(0.1, 1), strong(0.05, 2)])


# ---------------------------------------------------------------------------------- the loss


def traced(communication: float, idle: float) -> dict[str, Any]:
    shares = {"communication": communication, "idle": idle, "other": 1 - communication - idle}
    rows = [{"part": part, "share": share} for part, share in shares.items()]
    return {"trace": [{"rows": rows, "step_s": 0.08, "steps": [40]}, None]}


def test_an_optimizer_that_is_not_divided_is_all_that_is_lost() -> None:
    # 10 + 60 + 30 ms on one device; 5 + 30 + 30 ms on two, where 50 ms would be ideal.
    one, two = strong(0.1, 1), strong(0.065, 2, parts=(5 / 65, 30 / 65))
    loss = explain(one, two)
    assert loss.share == pytest.approx(15 / 65)
    assert loss.parts == pytest.approx(
        {"input": 0.0, "optimizer": 15 / 65, "forward and backward": 0.0}, abs=1e-12
    )


def test_a_weak_step_is_held_to_that_of_the_baseline() -> None:
    # 10 + 60 + 30 ms, then 40 + 60 + 25 ms: input lost 30 of 125, the optimizer gained 5.
    loss = explain(weak(0.1, 1), weak(0.125, 2, parts=(40 / 125, 25 / 125)))
    assert loss.share == pytest.approx(0.2)
    assert (loss.parts["input"], loss.parts["optimizer"]) == pytest.approx((0.24, -0.04))


def test_communication_is_told_apart_with_a_trace_alone() -> None:
    one = strong(0.1, 1)
    untold = explain(one, strong(0.08, 2))
    assert "exposed communication" not in untold.parts
    assert any("`--trace` on both runs" in remark for remark in untold.caveats)
    told = explain(one, strong(0.08, 2, changes=traced(0.25, 0.1)))
    assert told.parts["exposed communication"] == pytest.approx(0.25)
    before, after = (loss.parts["forward and backward"] for loss in (untold, told))
    assert after == pytest.approx(before - 0.25)
    assert told.traced is not None
    assert told.traced.idle == pytest.approx(0.1)


def test_a_baseline_of_two_devices_that_was_not_traced_leaves_communication_untold() -> None:
    loss = explain(strong(0.1, 2), strong(0.06, 4, changes=traced(0.25, 0.1)))
    assert "exposed communication" not in loss.parts


@pytest.mark.parametrize("changes", [{}, traced(0.25, 0.1)])
def test_parts_add_up_to_the_loss_which_is_that_of_the_curve(changes: dict[str, Any]) -> None:
    one, two = strong(0.1, 1, noise=0.3), strong(0.07, 2, noise=0.3, changes=changes)
    loss, curve = explain(one, two), only([one, two])
    assert math.fsum(loss.parts.values()) == pytest.approx(loss.share)
    assert loss.share == pytest.approx(1 - curve.efficiency(curve.points[1]).value)


def test_the_slowest_rank_is_named_and_its_cost_is_not_guessed() -> None:
    loss = explain(strong(0.1, 1), strong(0.05, 2, slowest=(1, 1, 1, 0)))
    assert loss.slowest == Slowest(rank=1, share=0.75, chance=0.5)


def clocked(communication: float, least: float) -> dict[str, list[float]]:
    """Seconds of 60 steps of 80 ms and the two before; they come out of forward and backward."""
    return {"communication_s": [communication] * 62, "least_communication_s": [least] * 62}


def test_communication_and_waiting_are_told_by_the_clock_where_it_does() -> None:
    # 80 ms: 16 of communication on the slowest rank, 12 on the one that others waited for.
    one, two = strong(0.1, 1), strong(0.08, 2, changes=traced(0.25, 0.1))
    samples = two.record["samples"] | clocked(0.016, 0.012)
    two = make_run(two.record | {"samples": samples}, two.name)
    loss = explain(one, two)
    assert loss.parts["exposed communication"] == pytest.approx(0.15)
    assert loss.parts["waiting for the slowest rank"] == pytest.approx(0.05)
    assert math.fsum(loss.parts.values()) == pytest.approx(loss.share)
    assert loss.traced is None
    assert not any("trace" in caveat for caveat in loss.caveats)
    untold = explain(strong(0.1, 2), two)
    assert untold.parts.keys() == {"input", "optimizer", "forward and backward"}


def test_a_loss_needs_two_steady_runs_of_one_recipe() -> None:
    with pytest.raises(ValueError, match=r"run runs/2.json has no steady state; measure it"):
        explain(strong(0.1, 1), strong(0.05, 2, steps=3))
    with pytest.raises(ValueError, match="run is of recipe vit and baseline of gpt"):
        explain(strong(0.1, 1), make_run(make_record("vit")))
