"""What JSON must hold: fields by dotted name, each of some kinds. The first wrong one is told."""

import sys
from collections.abc import Mapping
from types import NoneType
from typing import Any

Kinds = type | tuple[type, ...]
NUMBER = (int, float)
MISSING = object()
EXACT = frozenset({str, bool, NoneType, list, dict})  # of these every value is as good as another
RELATIVE_ERROR = 1e-9  # two ways to one number differ by rounding, not by more

# One rank's machine, as records tell it; what is not told counts as null.
HOST: dict[str, Kinds] = {
    "hostname": (str, NoneType),
    "cpu": (str, NoneType),
    "cpu_cores": (int, NoneType),
    "memory_bytes": (int, NoneType),
    "system": (str, NoneType),
    "machine": (str, NoneType),
    "device": str,
    "threads": (int, NoneType),
    "device_memory_bytes": (int, NoneType),
    "float32_matmul_precision": (str, NoneType),
    "sm_clock_hz": (*NUMBER, NoneType),
    "memory_clock_hz": (*NUMBER, NoneType),
}


def check_fields(
    values: Mapping[str, Any], kinds: Mapping[str, Kinds], where: str, *, missing: Any = MISSING
) -> None:
    """Raises ValueError for the first field that is missing or of another kind.

    Args:
        missing: what a field counts as that is not there.
    """
    for field, kind in kinds.items():
        value = look_up(values, field, missing)
        if (found := type(value)) in EXACT and (found is kind or found in _each(kind)):
            continue
        if value is MISSING:
            raise ValueError(f"{where}: {field} is missing")
        if not fits(value, kind):
            raise ValueError(f"{where}: {field} is {value!r}; it must be {spelled(kind)}")


def check_lists(values: Mapping[str, Any], kinds: Mapping[str, Kinds], where: str) -> None:
    """Raises ValueError for the first field that is no list of its kinds."""
    for field, kind in kinds.items():
        items = look_up(values, field)
        if not isinstance(items, list):
            raise ValueError(f"{where}: {field} is not a list of {spelled(kind)}")
        if set(map(type, items)) <= EXACT.intersection(_each(kind)):
            continue
        if not all(fits(item, kind) for item in items):
            raise ValueError(f"{where}: {field} is not a list of {spelled(kind)}")


def look_up(values: Any, field: str, missing: Any = None) -> Any:
    """The value under a dotted name, or `missing`."""
    if type(values) is dict and "." not in field:  # thousands of records ask for a million fields
        return values.get(field, missing)
    for name in field.split("."):
        values = values.get(name, missing) if isinstance(values, Mapping) else missing
    return values


def fits(value: Any, kinds: Kinds) -> bool:
    """Whether a value is of one of the kinds; a number also has to be finite."""
    kinds = _each(kinds)
    if type(value) in EXACT:
        return type(value) in kinds
    # JSON has integers that no float can hold; Python reads NaN and Infinity too.
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        return False
    return isinstance(value, kinds)


def spelled(kinds: Kinds) -> str:
    return " or ".join("null" if kind is NoneType else kind.__name__ for kind in _each(kinds))


def _each(kinds: Kinds) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)
