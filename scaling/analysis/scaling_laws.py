"""Fits Amdahl's law and the universal scalability law to a curve, with bootstrap intervals.

p devices | s serial share | a contention | b coherency | t seconds per unit, on any scale

Amdahl 1967: S(p) = 1 / (s + (1 - s) / p). Gunther 1993, the universal scalability law:
C(p) = p / (1 + a (p - 1) + b p (p - 1)); Amdahl's law is the case b = 0, a = s. In both, the time
t = c (1 - a) / p + c a + c b (p - 1) is linear, so least squares has one solution and needs no
start. The time c of one device is fitted too, since the baseline is as noisy as other points and
may have several devices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from scaling.analysis.efficiency import Curve, Estimate

if TYPE_CHECKING:  # numpy is slow to import, and a login node may have none
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LawName = Literal["Amdahl", "USL"]
PARAMETERS: dict[LawName, tuple[str, ...]] = {"Amdahl": ("s",), "USL": ("a", "b")}
LEAST_COUNTS = 3
RESAMPLES = 2000
SEED = 20041
TAIL = 0.025  # share of the resamples beyond either end of an interval
LARGEST_NOISE = 3.0  # of a logarithm: a point that is 20 times off carries no information anyway
NORMAL = 1.959964  # standard deviations in half a 95 % interval


@dataclass(frozen=True, kw_only=True)
class LawPoint:
    """The measured speed-up of one device count."""

    devices: int
    speedup: float  # over any baseline that all points share
    deviation: float | None = None  # of the rate's logarithm, 0.01 is 1 %; None: not known

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"devices is {self.devices}; give 1 or more")
        if not 0 < self.speedup < math.inf:
            raise ValueError(f"speedup is {self.speedup}; give a finite number above 0")
        if self.deviation is not None and not 0 <= self.deviation < math.inf:
            raise ValueError(f"deviation is {self.deviation}; give 0 or more, or None")


@dataclass(frozen=True, kw_only=True)
class LawFit:
    """A law fitted to a curve; without parameters if there is a reason against a fit."""

    name: LawName
    parameters: dict[str, Estimate] = field(default_factory=dict)
    largest_error: float = 0.0  # relative, of the law at any point
    remarks: tuple[str, ...] = ()
    reason: str | None = None


def fit_laws(curve: Curve) -> tuple[LawFit, LawFit]:
    """Returns the fits of Amdahl's law and of the universal scalability law."""
    points = [
        LawPoint(
            devices=point.devices,
            speedup=curve.speedup(point).value,
            # Of the normal distribution with the same interval. The standard error itself would be
            # too small: with two launches it has one degree of freedom.
            deviation=None if (half := point.rate.log_half_width) is None else half / NORMAL,
        )
        for point in curve.points
    ]
    usl = fit_law("USL", points)
    if curve.scaling == "weak":
        return LawFit(name="Amdahl", reason="it is a law of a fixed global batch"), usl
    return fit_law("Amdahl", points), usl


def fit_law(name: LawName, points: Sequence[LawPoint]) -> LawFit:
    """Fits a law by least squares of the relative error, with 0 <= s, a <= 1 and b >= 0.

    The intervals come from a parametric bootstrap (Efron & Tibshirani 1993, chapter 21) with a
    constant seed: the law is fitted again to its own predictions with normal noise. The noise has
    the deviations of the points, scaled up if the points scatter more than that. If a point has no
    deviation, or 0, all points have equal weight, and the noise is estimated from their scatter,
    with the uncertainty of that estimate (Student's t).

    Raises ValueError if two points have the same device count.
    """
    counts = [point.devices for point in points]
    if len(set(counts)) != len(counts):
        raise ValueError(f"devices are {counts}; pool the points of one count first")
    if len(counts) < LEAST_COUNTS:
        return LawFit(name=name, reason=f"{len(counts)} device counts, a fit needs {LEAST_COUNTS}")
    import numpy as np

    points = sorted(points, key=lambda point: point.devices)
    p = np.asarray([point.devices for point in points], dtype=np.float64)
    # The coefficients are c (1 - a), c a and, for the universal scalability law, c b.
    columns = np.stack([1 / p, np.ones_like(p), p - 1][: 1 + len(PARAMETERS[name])], axis=1)
    times = np.asarray([1 / point.speedup for point in points])
    has_deviations = all(point.deviation for point in points)  # one of 0 would have all the weight
    deviations = np.asarray([point.deviation if has_deviations else 1.0 for point in points])
    coefficients = _solve(columns, times[None], deviations)[0]
    fitted = columns @ coefficients
    errors = fitted / times - 1
    freedom = len(points) - columns.shape[1]
    values = _parameters(coefficients[None])[0]
    reason, low, high = None, [None] * len(values), [None] * len(values)
    if has_deviations or freedom:
        noise = _noise(errors, deviations, freedom, has_deviations=has_deviations)
        resampled = _parameters(_solve(columns, fitted * np.exp(noise), deviations))
        low, high = np.quantile(resampled, (TAIL, 1 - TAIL), axis=0).tolist()
    else:
        reason = f"{len(points)} device counts without intervals are too few to estimate the noise"
    return LawFit(
        name=name,
        parameters={
            parameter: Estimate(value=float(values[i]), low=low[i], high=high[i], reason=reason)
            for i, parameter in enumerate(PARAMETERS[name])
        },
        largest_error=float(np.max(np.abs(errors))),
        remarks=tuple(_remarks(name, points, values, has_deviations=has_deviations)),
    )


def _noise(
    errors: "Floats", deviations: "Floats", freedom: int, *, has_deviations: bool
) -> "Floats":
    """Returns the noise of each resample's points, shape (resamples, points)."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    normal = rng.standard_normal((RESAMPLES, len(errors))) * deviations
    scatter = float(np.sum((errors / deviations) ** 2)) / freedom if freedom else 0.0
    if has_deviations:
        noise = normal * math.sqrt(max(1.0, scatter))
    else:
        noise = normal * np.sqrt(scatter * freedom / rng.chisquare(freedom, (RESAMPLES, 1)))
    return np.clip(noise, -LARGEST_NOISE, LARGEST_NOISE)


def _solve(columns: "Floats", times: "Floats", deviations: "Floats") -> "Floats":
    """Solves non-negative least squares for each row of times; returns shape (rows, columns).

    There are three columns at most, so every set of nonzero coefficients is solved without the
    bound. The result is the solution without a negative coefficient that explains the most.
    """
    import numpy as np

    design = columns / (times * deviations)[:, :, None]  # divided by the time: relative errors
    scale = np.linalg.norm(design, axis=1, keepdims=True)
    design = design / scale
    transposed = design.transpose(0, 2, 1)
    gram, target = transposed @ design, transposed @ (1 / deviations)
    best = np.zeros_like(target)
    most_explained = np.full(len(times), -np.inf)
    for nonzero in ([0], [1], [0, 1], [0, 2], [1, 2], [0, 1, 2]):  # with 2 alone, c would be 0
        if nonzero[-1] == columns.shape[1]:
            continue
        inner = gram[:, nonzero][:, :, nonzero]
        solution = np.linalg.solve(inner, target[:, nonzero, None])[:, :, 0]
        explained = np.sum(solution * target[:, nonzero], axis=1)
        is_better = (solution >= 0).all(axis=1) & (explained > most_explained)
        most_explained[is_better] = explained[is_better]
        best[is_better] = 0.0
        best[np.ix_(is_better, nonzero)] = solution[is_better]
    coefficients: Floats = best / scale[:, 0]
    return coefficients


def _parameters(coefficients: "Floats") -> "Floats":
    """Divides each row of coefficients by c; the columns follow `PARAMETERS`."""
    parameters: Floats = coefficients[:, 1:] / coefficients[:, :2].sum(axis=1, keepdims=True)
    return parameters


def _remarks(
    name: LawName, points: Sequence[LawPoint], values: Sequence[float], *, has_deviations: bool
) -> list[str]:
    remarks = []
    first, last = points[0], points[-1]
    if last.speedup / first.speedup > last.devices / first.devices:
        remarks.append("superlinear: no parameter may be below 0, so the law cannot follow")
    if name == "Amdahl" and values[0] == 1.0:
        remarks.append("no faster with more devices: s is at its bound of 1")
    if name == "USL" and len(points) == LEAST_COUNTS:
        remarks.append("three device counts hardly determine b")
    if not has_deviations:
        remarks.append("a point has no interval or one of zero width: all points weigh the same")
    return remarks
