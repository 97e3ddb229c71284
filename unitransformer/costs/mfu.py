"""Computes the MFU and HFU of a run for each FLOP convention, or says why there is none.

MFU is the model's FLOP/s over the dense peak (Chowdhery et al. 2022, appendix B). FLOP/s that
include recomputation give HFU and are never called MFU.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

from unitransformer.costs.flops import CONVENTIONS
from unitransformer.costs.gpus import Peak, find_peak

_TOLERANCE = 1e-9  # relative; the values of a row are quotients of one another


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The highest matrix-multiply rate that was measured on one device of this machine."""

    flops_per_s: float
    dtype: str

    def __post_init__(self) -> None:
        _check_positive("ceiling.flops_per_s", self.flops_per_s)


@dataclass(frozen=True, kw_only=True)
class MfuRow:
    """One convention. A value that would be a guess is None, and `reason` says why.

    Raises:
        ValueError: values contradict each other, or the utilisation lacks a reason.
    """

    convention: str
    definition: str
    kind: Literal["MFU", "HFU"]
    flops_per_unit: float  # per token or image
    units_per_s: float | None  # per device
    flops_per_s: float | None  # per device
    dtype: str | None
    peak_flops_per_s: float | None
    peak_source: str | None
    peak_remark: str
    utilisation: float | None  # share of the peak
    reason: str | None  # why there is no utilisation
    ceiling_flops_per_s: float | None  # measured, in `dtype`
    share_of_ceiling: float | None
    flag: str | None  # what makes the row doubtful

    def __post_init__(self) -> None:
        rate = None if self.units_per_s is None else self.flops_per_unit * self.units_per_s
        self._check("flops_per_s", rate)
        if self.utilisation is not None:
            self._check("utilisation", _share(self.flops_per_s, self.peak_flops_per_s))
            if self.utilisation > 1:
                raise ValueError(
                    f"mfu.{self.convention}.utilisation is {self.utilisation}; no device is "
                    "faster than its peak: leave it out"
                )
        if self.share_of_ceiling is not None:
            self._check("share_of_ceiling", _share(self.flops_per_s, self.ceiling_flops_per_s))
        if (self.utilisation is None) == (self.reason is None):
            raise ValueError(
                f"mfu.{self.convention}.utilisation is {self.utilisation} and its reason is "
                f"{self.reason!r}; give one of them"
            )

    def _check(self, field: str, derived: float | None) -> None:
        value: float | None = getattr(self, field)
        if value is None or derived is None:
            agrees = value is derived
        else:
            agrees = math.isclose(value, derived, rel_tol=_TOLERANCE)
        if not agrees:
            raise ValueError(
                f"mfu.{self.convention}.{field} is {value}; by the other values of its row it is "
                f"{derived}"
            )


_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    str: (str,),
    str | None: (str, NoneType),
    float: (int, float),
    float | None: (int, float, NoneType),
    Literal["MFU", "HFU"]: (str,),
}
_FIELDS = {name: _JSON_TYPES[hint] for name, hint in MfuRow.__annotations__.items()}


def read_rows(values: Sequence[Any], where: str = "mfu") -> tuple[MfuRow, ...]:
    """Reads the rows of a record, three times faster than `config.from_dict`.

    Raises:
        ValueError: a row lacks a field, has a value of another type in one, or contradicts itself.
    """
    for index, row in enumerate(values):
        if not isinstance(row, Mapping) or row.keys() != _FIELDS.keys():
            raise ValueError(f"{where}.{index} must have exactly the fields {', '.join(_FIELDS)}")
        for name, types in _FIELDS.items():
            value = row[name]
            is_infinite = type(value) in (int, float) and not abs(value) <= sys.float_info.max
            if type(value) not in types or is_infinite:
                raise ValueError(f"{where}.{index}.{name} is {value!r}")
    if not values:
        raise ValueError(f"{where} is empty")
    return tuple(MfuRow(**row) for row in values)


def build_mfu_report(
    flops_per_unit: Mapping[str, float],
    *,
    units_per_s: float | None,
    num_devices: int,
    device_name: str,
    precision: str,
    allows_tf32: bool | None = None,
    ceiling: Ceiling | None = None,
) -> tuple[MfuRow, ...]:
    """Returns a row for every convention of `flops_per_unit`, in its order.

    Args:
        flops_per_unit: training FLOPs per token or image, by convention.
        units_per_s: of all devices together; None without a steady state.
        device_name: as for `gpus.find_peak`; so are `precision` and `allows_tf32`.
        ceiling: measured on this machine in this job.

    Raises:
        ValueError: the convention is unknown, or a count or rate is impossible.
    """
    for convention, count in flops_per_unit.items():
        if convention not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise ValueError(f"{convention} is not a FLOP convention; known: {known}")
        _check_positive(f"flops_per_unit.{convention}", count)
    if units_per_s is not None:
        _check_positive("units_per_s", units_per_s)
    if num_devices < 1:
        raise ValueError(f"num_devices is {num_devices}; it must be at least 1")
    peak = find_peak(device_name, precision, allows_tf32=allows_tf32)
    rate = None if units_per_s is None else units_per_s / num_devices
    return tuple(
        _build_row(convention, count, rate, peak, ceiling)
        for convention, count in flops_per_unit.items()
    )


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}; it must be a number above 0")


def _build_row(
    convention: str, count: float, rate: float | None, peak: Peak, ceiling: Ceiling | None
) -> MfuRow:
    flops_per_s = None if rate is None else count * rate
    utilisation = _share(flops_per_s, peak.flops_per_s)
    is_impossible = utilisation is not None and utilisation > 1
    reason = peak.reason
    if rate is None:
        reason = "no steady state was reached, so there is no rate"
    elif is_impossible:
        reason = (
            f"above the peak ({utilisation:.3f} of it): this convention counts work that was not "
            "done, or the clock, the count or the device's name is wrong"
        )
    is_comparable = ceiling is not None and ceiling.dtype == peak.dtype
    measured = ceiling.flops_per_s if ceiling is not None and is_comparable else None
    share = None if is_impossible else _share(flops_per_s, measured)
    flag = None
    if ceiling is not None and not is_comparable:
        dtype = peak.dtype or "an unknown format"
        flag = f"the ceiling was measured in {ceiling.dtype}, the run computed in {dtype}"
    elif share is not None and share > 1:
        flag = f"above the ceiling measured on this machine ({share:.3f} of it)"
    return MfuRow(
        convention=convention,
        definition=CONVENTIONS[convention],
        kind="HFU" if convention == "hardware" else "MFU",
        flops_per_unit=count,
        units_per_s=rate,
        flops_per_s=flops_per_s,
        dtype=peak.dtype,
        peak_flops_per_s=peak.flops_per_s,
        peak_source=peak.source,
        peak_remark=peak.remark,
        utilisation=None if reason else utilisation,
        reason=reason,
        ceiling_flops_per_s=measured,
        share_of_ceiling=share,
        flag=flag,
    )


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
