"""Tests fits of Amdahl's and Gunther's laws to points that follow them."""

import math
import random

import numpy as np
import pytest

from scaling.analysis.efficiency import find_curves
from scaling.analysis.scaling_laws import LawFit, LawName, LawPoint, fit_law, fit_laws
from tests.builders.runs import strong, weak

COUNTS = (1, 2, 4, 8, 16, 32)
CASES = 300


def capacity(p: int, a: float, b: float = 0.0) -> float:
    """Speed-up by Gunther's law; without `b` by Amdahl's."""
    return p / (1 + a * (p - 1) + b * p * (p - 1))


def follow(
    a: float, b: float = 0.0, counts: tuple[int, ...] = COUNTS, deviation: float | None = None
) -> list[LawPoint]:
    """Points on a law, relative to the smallest count."""
    first = capacity(counts[0], a, b)
    return [
        LawPoint(devices=p, speedup=capacity(p, a, b) / first, deviation=deviation) for p in counts
    ]


def values(law: LawFit) -> dict[str, float]:
    return {name: estimate.value for name, estimate in law.parameters.items()}


def covered(law: LawFit, name: str, true: float) -> bool:
    estimate = law.parameters[name]
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= true <= estimate.high


@pytest.mark.parametrize("counts", [(1, 2, 4), COUNTS, (4, 8, 16, 64)])
@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (0.05, 0.0), (0.05, 0.002), (1.0, 0.0)])
def test_noise_free_points_recover_the_parameters_for_any_baseline(
    counts: tuple[int, ...], a: float, b: float
) -> None:
    usl = fit_law("USL", follow(a, b, counts))
    assert values(usl) == pytest.approx({"a": a, "b": b}, abs=1e-9)
    assert usl.largest_error < 1e-9
    if b == 0:
        assert values(fit_law("Amdahl", follow(a, b, counts))) == pytest.approx({"s": a}, abs=1e-9)


@pytest.mark.parametrize("has_deviations", [True, False])
@pytest.mark.parametrize(
    ("name", "true"), [("Amdahl", {"s": 0.03}), ("USL", {"a": 0.03, "b": 0.001})]
)
def test_intervals_cover_the_true_parameters_with_two_percent_noise(
    name: LawName, true: dict[str, float], has_deviations: bool
) -> None:
    rng = np.random.default_rng(1)
    exact = follow(*true.values(), deviation=0.02 if has_deviations else None)
    hits = dict.fromkeys(true, 0)
    for _ in range(CASES):
        noise = np.exp(0.02 * rng.standard_normal(len(exact)))
        points = [
            LawPoint(devices=p.devices, speedup=p.speedup * float(n), deviation=p.deviation)
            for p, n in zip(exact, noise, strict=True)
        ]
        law = fit_law(name, points)
        for parameter in true:
            hits[parameter] += covered(law, parameter, true[parameter])
    for parameter, number in hits.items():
        assert 0.90 <= number / CASES <= 0.98, parameter


def test_two_launches_a_point_give_intervals_that_still_cover() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(100):
        runs = [
            strong(rng.lognormvariate(math.log(0.1 / capacity(p, 0.1)), 0.03), p, f"{p}-{n}.json")
            for p in (1, 2, 4, 8)
            for n in range(2)
        ]
        (curve,) = find_curves(runs, {})
        hits += covered(fit_laws(curve)[0], "s", 0.1)
    assert hits >= 90


def test_superlinear_scaling_is_fitted_at_the_bound_with_a_remark() -> None:
    points = [LawPoint(devices=p, speedup=p**1.1, deviation=0.01) for p in (1, 2, 4, 8)]
    for name in ("Amdahl", "USL"):
        law = fit_law(name, points)
        assert set(values(law).values()) == {0.0}
        assert any(remark.startswith("superlinear") for remark in law.remarks)
        assert law.largest_error > 0.05


def test_slowdown_with_more_devices_is_fitted_at_the_other_bound_of_amdahl() -> None:
    points = [LawPoint(devices=p, speedup=8 / p, deviation=0.01) for p in (8, 16, 32)]
    law = fit_law("Amdahl", points)
    assert values(law) == {"s": 1.0}
    assert any(remark.startswith("no faster with more devices") for remark in law.remarks)
    b = fit_law("USL", points).parameters["b"].value
    assert b > 0.01, "which the other law explains"


def test_perfect_scaling_has_serial_share_zero_with_an_interval_above() -> None:
    s = fit_law("Amdahl", follow(0.0, deviation=0.02)).parameters["s"]
    assert (s.value, s.low) == (pytest.approx(0.0, abs=1e-12), 0.0)
    assert s.high is not None
    assert 0.0005 < s.high < 0.01


def test_three_device_counts_give_a_wide_interval_for_coherency() -> None:
    law = fit_law("USL", follow(0.05, 0.01, (1, 2, 4), deviation=0.02))
    assert "three device counts hardly determine b" in law.remarks
    b = law.parameters["b"]
    assert b.low == 0.0
    assert b.high is not None
    assert b.high > 2 * b.value


def test_three_device_counts_without_intervals_give_no_interval() -> None:
    b = fit_law("USL", follow(0.05, 0.01, (1, 2, 4))).parameters["b"]
    assert (b.low, b.high) == (None, None)
    assert b.reason is not None
    assert "are too few to estimate the noise" in b.reason


def test_a_point_with_a_narrow_interval_counts_more() -> None:
    bent = [
        LawPoint(devices=p, speedup=capacity(p, 0.05) * (1.1 if p == 8 else 1), deviation=sd)
        for p, sd in zip((1, 2, 4, 8), (0.001, 0.001, 0.001, 0.1), strict=True)
    ]
    alike = [LawPoint(devices=p.devices, speedup=p.speedup) for p in bent]
    actual = "a point has no interval or one of zero width: all points weigh the same"
    weighted, plain = fit_law("Amdahl", bent), fit_law("Amdahl", alike)
    assert abs(values(weighted)["s"] - 0.05) < 0.001 < abs(values(plain)["s"] - 0.05)
    assert (actual in weighted.remarks, actual in plain.remarks) == (False, True)


def test_points_far_from_the_fitted_law_widen_the_interval() -> None:
    near, far = (
        [
            LawPoint(devices=p, speedup=capacity(p, 0.05) * (1 + sign * off), deviation=0.001)
            for p, sign in zip((1, 2, 4, 8), (1, -1, 1, -1), strict=True)
        ]
        for off in (0.0, 0.05)
    )
    narrow, wide = (fit_law("Amdahl", points).parameters["s"] for points in (near, far))
    assert None not in (narrow.low, narrow.high, wide.low, wide.high)
    assert wide.high - wide.low > 10 * (narrow.high - narrow.low)  # type: ignore[operator]


def test_three_scattered_points_have_an_uninformative_interval() -> None:
    points = [LawPoint(devices=p, speedup=s) for p, s in ((1, 1.0), (2, 2.4), (4, 2.6))]
    s = fit_law("Amdahl", points).parameters["s"]
    assert s.low == 0.0
    assert s.high is not None
    assert s.high > 0.9


@pytest.mark.parametrize("counts", [(), (1,), (1, 2)])
def test_fewer_than_three_device_counts_are_not_fitted_and_have_a_reason(
    counts: tuple[int, ...],
) -> None:
    law = fit_law("Amdahl", [LawPoint(devices=p, speedup=p) for p in counts])
    assert law.parameters == {}
    assert law.reason == f"{len(counts)} device counts, a fit needs 3"


def test_equal_points_give_equal_laws_in_any_order() -> None:
    points = follow(0.05, 0.001, deviation=0.02)
    assert fit_law("USL", points) == fit_law("USL", points[::-1])


def test_a_measured_curve_is_fitted_and_amdahl_only_if_it_is_strong_scaling() -> None:
    runs = [strong(0.1 / capacity(p, 0.25), p, noise=0.001) for p in (1, 2, 4)]
    (curve,) = find_curves(runs)
    amdahl, usl = fit_laws(curve)
    assert values(amdahl)["s"] == pytest.approx(0.25, abs=0.01)
    assert usl.reason is None
    (curve,) = find_curves([weak(0.1, p) for p in (1, 2, 4)])
    assert fit_laws(curve)[0].reason == "it is a law of a fixed global batch"


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"devices": 0, "speedup": 1.0}, "devices is 0; give 1 or more"),
        ({"devices": 1, "speedup": 0.0}, "speedup is 0.0; give a finite number above 0"),
        ({"devices": 1, "speedup": math.inf}, "speedup is inf"),
        ({"devices": 1, "speedup": 1.0, "deviation": -1.0}, "deviation is -1.0; give 0 or more"),
    ],
)
def test_an_impossible_point_is_refused(point: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LawPoint(**point)  # type: ignore[arg-type]


def test_two_points_of_one_count_are_refused() -> None:
    with pytest.raises(ValueError, match=r"devices are \[2, 2, 4\]; pool the points of one count"):
        fit_law("USL", [LawPoint(devices=p, speedup=1.0) for p in (2, 2, 4)])
