"""JSON that notices when it is changed: every top-level field carries a seal.

A seal is no signature: who mends it as well is not found out. It shows what an editor, a merge or
a broken disk did, down to the last digit, and where.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEALS = "seals"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` and a seal of every field: 16 hexadecimal digits of the SHA-256 of its JSON."""
    fields = {name: value for name, value in content.items() if name != SEALS}
    return {**fields, SEALS: {name: _seal(value) for name, value in fields.items()}}


def check_seals(content: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for the first field that is not as it was written."""
    seals = content.get(SEALS)
    if not isinstance(seals, Mapping):
        raise ValueError(f"{where}: {SEALS} is missing; measure again")
    for name in sorted({*content, *seals} - {SEALS}):
        if name not in content:
            raise ValueError(f"{where}: {name} is missing; measure again")
        if seals.get(name) != _seal(content[name]):
            raise ValueError(f"{where}: {name} was changed after it was written; measure again")


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path) -> Any:
    """The values in a file that was written by `json.dumps`.

    Raises:
        ValueError: not JSON, or a number that is spelled otherwise than Python spells it.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        if _as_written(values) == re.sub(r"\n *", "", text):
            return values  # written by `json.dumps(..., indent=1)`, every number as Python does
        return json.loads(text, parse_float=_exact_float)
    except RecursionError as error:
        raise ValueError("not JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON as it was written: {error}") from error


def _as_written(values: Any) -> str:
    """Without the line breaks, which stand in no string of JSON."""
    return json.dumps(values, separators=(",", ": "))


def _exact_float(text: str) -> float:
    # A changed last digit may stand for the same number, which has one seal.
    number = float(text)
    if repr(number) != text:
        raise ValueError(f"{text} was written as {number!r}")
    return number
