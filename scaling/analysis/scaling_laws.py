"""A curve over device counts in; the parameters of two laws of scaling out, with intervals.

p devices | s serial share | a contention | b coherency | t seconds of a unit, on any scale

Amdahl 1967: S(p) = 1 / (s + (1 - s) / p). Gunther 1993, the universal scalability law:
C(p) = p / (1 + a (p - 1) + b p (p - 1)); Amdahl's is that with b = 0 and a = s. Both are straight
in the time, t = c (1 - a) / p + c a + c b (p - 1), so that least squares has one answer and no
start to choose. The time c of one device is fitted too: the baseline is as noisy as the rest, and
need not be one device.
"""

import itertools
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
TAIL = 0.025  # of the resamples beyond either end of an interval
WILDEST = 3.0  # of noise in logarithms: a point that may be 20 times off tells nothing anyway
NORMAL = 1.959964  # deviations in half a 95 % interval


@dataclass(frozen=True, kw_only=True)
class LawPoint:
    """One device count."""

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
    """A law fitted to a curve, or the reason why not; then there are no parameters."""

    name: LawName
    parameters: dict[str, Estimate] = field(default_factory=dict)
    largest_error: float = 0.0  # relative, of the law at any point
    remarks: tuple[str, ...] = ()
    reason: str | None = None


def fit_laws(curve: Curve) -> tuple[LawFit, LawFit]:
    """Amdahl's law and the universal scalability law; Amdahl's only of a strong curve."""
    points = [
        LawPoint(
            devices=point.devices,
            speedup=curve.speedup(point).value,
            deviation=None if (half := point.rate.log_half_width) is None else half / NORMAL,
        )
        for point in curve.points
    ]
    usl = fit_law("USL", points)
    if curve.scaling == "weak":
        return LawFit(name="Amdahl", reason="it is a law of a fixed global batch"), usl
    return fit_law("Amdahl", points), usl


def fit_law(name: LawName, points: Sequence[LawPoint]) -> LawFit:
    """Least squares of the relative error; no parameter is below 0, s and a are at most 1.

    Intervals are those of a parametric bootstrap (Efron & Tibshirani 1993, chapter 21) with a
    constant seed: what the law says, with normal noise of the points' own deviations, fitted
    again. Deviations that do not explain how far the points are from the law are stretched until
    they do. Where a point has none, or 0, all count alike, and the noise is estimated from how far
    they are from the law, with its own uncertainty (Student's t).

    Raises:
        ValueError: two points of one device count.
    """
    counts = [point.devices for point in points]
    if len(set(counts)) != len(counts):
        raise ValueError(f"devices are {counts}; pool the points of one count first")
    if len(counts) < LEAST_COUNTS:
        return LawFit(name=name, reason=f"{len(counts)} device counts, a fit needs {LEAST_COUNTS}")
    return _fit(name, sorted(points, key=lambda point: point.devices))


def _fit(name: LawName, points: Sequence[LawPoint]) -> LawFit:
    import numpy as np

    columns = _columns(name, [point.devices for point in points])
    times = np.asarray([1 / point.speedup for point in points])
    deviations = _deviations(points)
    coefficients = _solve(columns, times[None], deviations)[0]
    fitted = columns @ coefficients
    errors = fitted / times - 1
    freedom = len(points) - columns.shape[1]
    values = _parameters(coefficients[None])[0]
    noise, reason = _noise(errors, deviations, freedom, has_own=_has_deviations(points))
    ends = np.full((2, len(values)), np.nan)
    if noise is not None:
        resampled = _parameters(_solve(columns, fitted * np.exp(noise), deviations))
        ends = np.quantile(resampled, (TAIL, 1 - TAIL), axis=0)
    return LawFit(
        name=name,
        parameters={
            parameter: Estimate(
                value=float(values[i]),
                low=None if noise is None else float(ends[0, i]),
                high=None if noise is None else float(ends[1, i]),
                reason=reason,
            )
            for i, parameter in enumerate(PARAMETERS[name])
        },
        largest_error=float(np.max(np.abs(errors))),
        remarks=tuple(_remarks(name, points, values)),
    )


def _columns(name: LawName, counts: Sequence[int]) -> "Floats":
    """What c (1 - a), c a and c b are multiplied with; shape (points, 2 or 3)."""
    import numpy as np

    p = np.asarray(counts, dtype=np.float64)
    return np.stack([1 / p, np.ones_like(p), p - 1][: 1 + len(PARAMETERS[name])], axis=1)


def _has_deviations(points: Sequence[LawPoint]) -> bool:
    """Whether every point knows its own; one of 0 would have all the weight."""
    return all(point.deviation for point in points)


def _deviations(points: Sequence[LawPoint]) -> "Floats":
    import numpy as np

    has_own = _has_deviations(points)
    return np.asarray([point.deviation if has_own else 1.0 for point in points], dtype=np.float64)


def _noise(
    errors: "Floats", deviations: "Floats", freedom: int, *, has_own: bool
) -> tuple["Floats | None", str | None]:
    """Noise of each resample's points, shape (resamples, points), or why it is not known."""
    import numpy as np

    if not has_own and not freedom:
        return None, (
            f"{len(errors)} device counts without intervals leave nothing to tell noise from"
        )
    drawn = np.random.default_rng(SEED)
    normal = drawn.standard_normal((RESAMPLES, len(errors))) * deviations
    scatter = float(np.sum((errors / deviations) ** 2)) / freedom if freedom else 0.0
    if has_own:
        noise = normal * math.sqrt(max(1.0, scatter))
    else:
        noise = normal * np.sqrt(scatter * freedom / drawn.chisquare(freedom, (RESAMPLES, 1)))
    return np.clip(noise, -WILDEST, WILDEST), None


def _solve(columns: "Floats", times: "Floats", deviations: "Floats") -> "Floats":
    """Coefficients, none below 0, of each row of times; shape (rows, columns).

    There are so few that every choice of those that are not 0 is tried, c above 0 among them.
    """
    import numpy as np

    rows = columns / (times * deviations)[:, :, None]  # divided by the time: relative errors
    scale = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / scale
    turned = rows.transpose(0, 2, 1)
    inner, told = turned @ rows, turned @ (1 / deviations)
    best = np.zeros_like(told)
    most = np.full(len(times), -np.inf)  # explained by the best so far
    for chosen in _choices(columns.shape[1]):
        found = np.linalg.solve(inner[:, chosen][:, :, chosen], told[:, chosen, None])[:, :, 0]
        explained = np.sum(found * told[:, chosen], axis=1)
        is_better = (found >= 0).all(axis=1) & (explained > most)
        most = np.where(is_better, explained, most)
        whole = np.zeros_like(told)
        whole[:, chosen] = found
        best = np.where(is_better[:, None], whole, best)
    coefficients: Floats = best / scale[:, 0]
    return coefficients


def _choices(number: int) -> list[list[int]]:
    """Every choice of columns with the first or the second, without which there is no c."""
    sizes = range(1, number + 1)
    chosen = [list(c) for size in sizes for c in itertools.combinations(range(number), size)]
    return [choice for choice in chosen if choice[0] < 2]


def _parameters(coefficients: "Floats") -> "Floats":
    """Of each row of coefficients, in the order of `PARAMETERS`."""
    found: Floats = coefficients[:, 1:] / coefficients[:, :2].sum(axis=1, keepdims=True)
    return found


def _remarks(name: LawName, points: Sequence[LawPoint], values: Sequence[float]) -> list[str]:
    remarks = []
    first, last = points[0], points[-1]
    if last.speedup / first.speedup > last.devices / first.devices:
        remarks.append("more than ideal: no parameter is below 0, so the law cannot follow")
    if name == "Amdahl" and values[0] == 1.0:
        remarks.append("no faster with more devices: s is at its bound of 1")
    if name == "USL" and len(points) == LEAST_COUNTS:
        remarks.append("b is hardly told by three device counts")
    if not _has_deviations(points):
        remarks.append("a point has no interval of any width: all count alike")
    return remarks
