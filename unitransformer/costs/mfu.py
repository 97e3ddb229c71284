"""The MFU passport: for each way of counting FLOPs what it counts, what it is divided by, and why
there is no number where there is none.

In: FLOPs of a token or picture by convention, the rate of the run, where and in what it computed,
and the ceiling measured on that machine in that job. Out: one `MfuRow` a convention. MFU is FLOP/s of
the model over the dense peak (Chowdhery et al. 2022, appendix B); FLOP/s that include what was
computed again give HFU and are never called MFU.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

from unitransformer.costs.flops import CONVENTIONS
from unitransformer.costs.peaks import Peak, find_peak

_TOLERANCE = 1e-9  # relative; a row's figures are quotients of one another
_NUMBER, _TEXT = (int, float), (str, NoneType)
# What a record holds of each row.
KINDS: dict[str, tuple[type, ...]] = {
    "convention": (str,),
    "counts": (str,),
    "kind": (str,),
    "flops_per_unit": _NUMBER,
    "units_per_s": (*_NUMBER, NoneType),
    "flops_per_s": (*_NUMBER, NoneType),
    "dtype": _TEXT,
    "peak_flops_per_s": (*_NUMBER, NoneType),
    "peak_source": _TEXT,
    "peak_remark": (str,),
    "utilisation": (*_NUMBER, NoneType),
    "reason": _TEXT,
    "ceiling_flops_per_s": (*_NUMBER, NoneType),
    "share_of_ceiling": (*_NUMBER, NoneType),
    "flag": _TEXT,
}


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The highest matrix-multiply rate that was measured on one device of this machine."""

    flops_per_s: float
    dtype: str

    def __post_init__(self) -> None:
        _check_positive("ceiling.flops_per_s", self.flops_per_s)


@dataclass(frozen=True, kw_only=True)
class MfuRow:
    """One convention. A figure that would be a guess is None, and `reason` says why.

    Raises:
        ValueError: figures that contradict each other, or a missing one without a reason.
    """

    convention: str
    counts: str  # in words
    kind: Literal["MFU", "HFU"]
    flops_per_unit: float  # of a token or picture
    units_per_s: float | None  # of one device
    flops_per_s: float | None  # of one device
    dtype: str | None
    peak_flops_per_s: float | None
    peak_source: str | None
    peak_remark: str
    utilisation: float | None  # share of the peak
    reason: str | None  # why there is no utilisation
    ceiling_flops_per_s: float | None  # measured, in `dtype`
    share_of_ceiling: float | None
    flag: str | None  # what makes the figures doubtful

    def __post_init__(self) -> None:
        rate = None if self.units_per_s is None else self.flops_per_unit * self.units_per_s
        self._check("flops_per_s", rate)
        if self.utilisation is not None:
            self._check("utilisation", _share(self.flops_per_s, self.peak_flops_per_s))
            if self.utilisation > 1:
                raise ValueError(
                    f"passport.{self.convention}.utilisation is {self.utilisation}; no device is "
                    "faster than its peak: leave it out"
                )
        if self.share_of_ceiling is not None:
            self._check("share_of_ceiling", _share(self.flops_per_s, self.ceiling_flops_per_s))
        if (self.utilisation is None) == (self.reason is None):
            raise ValueError(
                f"passport.{self.convention}.utilisation is {self.utilisation} and its reason is "
                f"{self.reason!r}; give one of them"
            )

    def _check(self, field: str, derived: float | None) -> None:
        value: float | None = getattr(self, field)
        if value is None or derived is None:
            fits = value is derived
        else:
            fits = math.isclose(value, derived, rel_tol=_TOLERANCE)
        if not fits:
            raise ValueError(
                f"passport.{self.convention}.{field} is {value}; by the other figures of its row "
                f"it is {derived}"
            )


def read_rows(values: Sequence[Any], where: str = "passport") -> tuple[MfuRow, ...]:
    """Rows as a record holds them.

    Raises:
        ValueError: the first row that lacks a field, has another kind of value in one, or
            contradicts itself.
    """
    rows = []
    for index, row in enumerate(values):
        if not isinstance(row, Mapping) or row.keys() != KINDS.keys():
            raise ValueError(f"{where}.{index} does not have exactly the fields {', '.join(KINDS)}")
        for name, kinds in KINDS.items():
            value = row[name]
            kind = type(value)
            is_infinite = kind in _NUMBER and not abs(value) <= sys.float_info.max
            if kind not in kinds or is_infinite:
                raise ValueError(f"{where}.{index}.{name} is {value!r}")
        rows.append(MfuRow(**row))
    if not rows:
        raise ValueError(f"{where} is empty")
    return tuple(rows)


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def build_mfu_report(
    flops_per_unit: Mapping[str, float],
    *,
    units_per_s: float | None,
    num_devices: int,
    device_name: str,
    precision: str,
    allows_tf32: bool | None = None,
    ceiling: Ceiling | None = None,
    padded_share: float = 0.0,
) -> tuple[MfuRow, ...]:
    """A row for every convention of `flops_per_unit`, in its order.

    Args:
        flops_per_unit: training FLOPs of a token or picture, by convention.
        units_per_s: tokens or pictures a second of all devices together, in steady state; None if
            the run was too short to reach it.
        num_devices: over all nodes, all of the kind `device_name`.
        device_name: as the driver prints it, or "cpu".
        precision: in Lightning's words, as "bf16-mixed".
        allows_tf32: whether TF32 may replace float32 (see `peaks.find_peak`); None: not known.
        ceiling: measured on this machine in this job.
        padded_share: share of the units that were padding.

    Raises:
        ValueError: an unknown convention, or a count or rate that cannot be.
    """
    _check(flops_per_unit, units_per_s, num_devices, padded_share)
    peak = find_peak(device_name, precision, allows_tf32=allows_tf32)
    rate = None if units_per_s is None else units_per_s / num_devices
    missing = _why_no_rate(rate, padded_share)
    return tuple(
        _build_row(convention, count, rate, peak, ceiling, missing)
        for convention, count in flops_per_unit.items()
    )


def _check(
    flops_per_unit: Mapping[str, float],
    units_per_s: float | None,
    num_devices: int,
    padded_share: float,
) -> None:
    for convention, count in flops_per_unit.items():
        if convention not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise ValueError(f"{convention} is no convention of counting FLOPs; known: {known}")
        _check_positive(f"flops_per_unit.{convention}", count)
    if units_per_s is not None:
        _check_positive("units_per_s", units_per_s)
    if num_devices < 1:
        raise ValueError(f"num_devices is {num_devices}; it must be at least 1")
    if not 0 <= padded_share < 1:
        raise ValueError(f"padded_share is {padded_share}; it must be in [0, 1)")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}; it must be a number above 0")


def _why_no_rate(rate: float | None, padded_share: float) -> str | None:
    if rate is None:
        return "no steady state was reached, so there is no rate"
    if padded_share:
        return f"{padded_share:.1%} of what was counted was padding: computed, and no work done"
    return None


def _build_row(
    convention: str,
    count: float,
    rate: float | None,
    peak: Peak,
    ceiling: Ceiling | None,
    missing: str | None,
) -> MfuRow:
    flops_per_s = None if rate is None else count * rate
    impossible = _why_impossible(flops_per_s, peak)
    reason = missing or peak.reason or impossible
    measured = ceiling.flops_per_s if ceiling and ceiling.dtype == peak.dtype else None
    share = None if missing or impossible else _share(flops_per_s, measured)
    return MfuRow(
        convention=convention,
        counts=CONVENTIONS[convention],
        kind="HFU" if convention == "hardware" else "MFU",
        flops_per_unit=count,
        units_per_s=rate,
        flops_per_s=flops_per_s,
        dtype=peak.dtype,
        peak_flops_per_s=peak.flops_per_s,
        peak_source=peak.source,
        peak_remark=peak.remark,
        utilisation=None if reason else _share(flops_per_s, peak.flops_per_s),
        reason=reason,
        ceiling_flops_per_s=measured,
        share_of_ceiling=share,
        flag=_find_flag(share, ceiling, peak),
    )


def _why_impossible(flops_per_s: float | None, peak: Peak) -> str | None:
    share = _share(flops_per_s, peak.flops_per_s)
    if share is None or share <= 1:
        return None
    return (
        f"above the peak ({share:.3f} of it): this way of counting claims work that was not done, "
        "or the clock, the count or the device's name is wrong"
    )


def _find_flag(share: float | None, ceiling: Ceiling | None, peak: Peak) -> str | None:
    if ceiling is not None and ceiling.dtype != peak.dtype:
        computed = peak.dtype or "a format that is not clear"
        return f"the ceiling was measured in {ceiling.dtype}, the run computed in {computed}"
    if share is not None and share > 1:
        return f"above the ceiling measured on this machine ({share:.3f} of it)"
    return None
