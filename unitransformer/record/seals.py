"""JSON that notices when it is changed: every top-level field carries a seal.

A seal is no signature: who mends it as well is not found out. It shows what an editor, a merge or
a broken disk did, down to the last digit, and where.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

SEALS = "seals"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` and a seal of every field: 16 hexadecimal digits of the SHA-256 of its JSON."""
    fields = {name: value for name, value in content.items() if name != SEALS}
    return {**fields, SEALS: {name: _seal(value) for name, value in fields.items()}}


def to_text(content: Mapping[str, Any], *, sort_keys: bool = False) -> str:
    """JSON with a line for each top-level field: what is sealed stands in it to the letter.

    Args:
        sort_keys: of the groups in a field. Its seal is then the digest of its text, so reading it
            writes nothing again.

    Raises:
        ValueError: a number that JSON has no word for.
    """
    fields = (
        f" {json.dumps(name)}: {json.dumps(value, allow_nan=False, sort_keys=sort_keys)}"
        for name, value in content.items()
    )
    return "{\n" + ",\n".join(fields) + "\n}\n"


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
    return _digest(json.dumps(value, sort_keys=True).encode())


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def read_json(path: Path) -> Any:
    """As `read_sealed`, the values alone."""
    return read_sealed(path)[0]


def read_sealed(path: Path) -> tuple[Any, bool]:
    """As `parse_sealed`, of a file; raises OSError where it cannot be read."""
    return parse_sealed(path.read_bytes())


def parse_sealed(content: bytes) -> tuple[Any, bool]:
    """The values in JSON, and whether all its seals hold.

    Where they do, which is found on the text, `check_seals` need not be asked.

    Raises:
        ValueError: not JSON, or a number that is spelled otherwise than Python spells it.
    """
    try:
        values = orjson.loads(content)
    except orjson.JSONDecodeError:
        pass  # a number that only Python reads, or no JSON: told below
    else:
        if _holds(values, content):
            return values, True
    try:
        text = content.decode()
        values = json.loads(text)
        if _as_written(values) == re.sub(r"\n *", "", text):
            return values, False  # written by `json.dumps(..., indent=1)`, numbers as Python does
        return json.loads(text, parse_float=_exact_float), False
    except RecursionError as error:
        raise ValueError("not JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON as it was written: {error}") from error


def _holds(values: Any, content: bytes) -> bool:
    """Whether every field stands in a text of `to_text`, or of `json.dumps(..., indent=1)`, to the
    letter as it was sealed. False says nothing: the text may have been laid out anew."""
    seals = values.get(SEALS) if isinstance(values, dict) else None
    if not isinstance(seals, dict) or list(values)[-1] != SEALS or {*values} != {*seals, SEALS}:
        return False
    fields = [field.partition(b'": ') for field in content[len('{\n "') :].split(b',\n "')]
    if [name.decode() for name, _, _ in fields] != list(values):
        return False
    return all(
        _is_sealed(_in_one_line(written), seals[name.decode()]) for name, _, written in fields[:-1]
    )


def _is_sealed(written: bytes, sealed: object) -> bool:
    """A seal is of names in their order, so a group whose names are in another is written again."""
    if _digest(written) == sealed:
        return True
    if not written.startswith((b"{", b"[{")):
        return False
    lists = written[1:-2].split(b"], ")
    is_flat = written.startswith(b"{") and written.endswith(b"]}")
    if is_flat and written.count(b'"') == 2 * len(lists) == 2 * written.count(b'": ['):
        # A group of lists of numbers, as the samples are: its text is put in order.
        return _digest(b"{" + b"], ".join(sorted(lists)) + b"]}") == sealed
    return _seal_of_groups(written) == sealed


@functools.lru_cache(maxsize=1024)  # many records of one machine hold the same groups
def _seal_of_groups(written: bytes) -> str | None:
    """None: the numbers or names in it are not written as Python writes them."""
    value = orjson.loads(written)
    return _seal(value) if json.dumps(value).encode() == written else None


def _in_one_line(text: bytes) -> bytes:
    """As `json.dumps` without `indent`; no line break stands in a string of JSON."""
    if b"\n" not in text:
        return text
    return re.sub(rb"\n *", b"", b", ".join(map(bytes.lstrip, text.split(b",\n"))))


def _as_written(values: Any) -> str:
    """Without the line breaks, which stand in no string of JSON."""
    return json.dumps(values, separators=(",", ": "))


def _exact_float(text: str) -> float:
    # A changed last digit may stand for the same number, which has one seal.
    number = float(text)
    if repr(number) != text:
        raise ValueError(f"{text} was written as {number!r}")
    return number
