"""Checks the types of JSON fields by their dotted names, and reports the first that is wrong."""

import math
import sys
from collections.abc import Mapping
from types import NoneType
from typing import Any

Kinds = type | tuple[type, ...]
NUMBER = (int, float)
MISSING = object()
UNBOUNDED = frozenset({str, bool, NoneType, list, dict})  # all values of these types are valid
RELATIVE_ERROR = 1e-9  # rounding differs by no more between two computations of one number

# The machine of one rank in a record; an absent field counts as null.
HOST_FIELDS: dict[str, Kinds] = {
    "device": str,
    **dict.fromkeys(("hostname", "cpu", "system", "machine"), (str, NoneType)),
    **dict.fromkeys(("cpu_cores", "memory_bytes", "threads"), (int, NoneType)),
    "device_memory_bytes": (int, NoneType),
    "float32_matmul_precision": (str, NoneType),
    **dict.fromkeys(("sm_clock_hz", "memory_clock_hz"), (*NUMBER, NoneType)),
}


def check_fields(
    values: Mapping[str, Any], kinds: Mapping[str, Kinds], where: str, *, missing: Any = MISSING
) -> None:
    """Raises ValueError for the first field that is missing or of another kind.

    Args:
        missing: the value of an absent field, if that is allowed.
    """
    for field, kind in kinds.items():
        if type(values) is dict and "." not in field:  # faster, for thousands of records
            value = values.get(field, missing)
        else:
            value = look_up(values, field, missing)
        if type(value) is kind and kind in UNBOUNDED:  # most are, and a call takes time
            continue
        if value is MISSING:
            raise ValueError(f"{where}: {field} is missing")
        if not is_of_kind(value, kind):
            raise ValueError(f"{where}: {field} is {value!r}; it must be {_format_kinds(kind)}")


def check_lists(values: Mapping[str, Any], kinds: Mapping[str, Kinds], where: str) -> None:
    """Raises ValueError for the first field that is not a list of its kinds."""
    for field, kind in kinds.items():
        items = look_up(values, field)
        if not isinstance(items, list) or not all(is_of_kind(item, kind) for item in items):
            raise ValueError(f"{where}: {field} is not a list of {_format_kinds(kind)}")


def agree(stored: Any, derived: Any) -> bool:
    """Returns whether two numbers differ by rounding at most; other values have to be equal."""
    if is_of_kind(stored, NUMBER) and is_of_kind(derived, NUMBER):
        return math.isclose(stored, derived, rel_tol=RELATIVE_ERROR)
    return bool(stored == derived)


def look_up(values: Any, field: str, missing: Any = None) -> Any:
    """Returns the value under a dotted name, or `missing`."""
    for name in field.split("."):
        values = values.get(name, missing) if isinstance(values, dict) else missing
    return values


def is_of_kind(value: Any, kinds: Kinds) -> bool:
    """Returns whether a value is of one of the kinds; a number also has to be finite."""
    own = type(value)
    if own in UNBOUNDED:  # a bool is not an int here
        return own is kinds or (type(kinds) is tuple and own in kinds)
    # JSON has integers that no float can hold; Python also reads NaN and Infinity.
    if own in NUMBER and not abs(value) <= sys.float_info.max:
        return False
    return isinstance(value, kinds)


def _format_kinds(kinds: Kinds) -> str:
    names = ("null" if kind is NoneType else kind.__name__ for kind in _as_tuple(kinds))
    return " or ".join(names)


def _as_tuple(kinds: Kinds) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)
