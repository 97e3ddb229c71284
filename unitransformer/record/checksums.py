"""Adds a checksum of every top-level field to JSON, and verifies them when it is read.

A checksum is not a signature: an edit that also updates it goes unnoticed. It shows which field an
editor, a merge or a broken disk has changed, down to the last digit.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from unitransformer.record.migration import OLD_CHECKSUMS

CHECKSUMS = "checksums"


def add_checksums(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `content` with 16 hexadecimal digits of the SHA-256 of each field's JSON."""
    fields = without_checksums(content)
    return {**fields, CHECKSUMS: {name: _checksum(value) for name, value in fields.items()}}


def without_checksums(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in content.items() if name not in (CHECKSUMS, OLD_CHECKSUMS)}


def to_text(content: Mapping[str, Any], *, sort_keys: bool = False) -> str:
    """Returns JSON with one line per top-level field.

    Args:
        sort_keys: sort the names within each field. Its checksum is then the digest of its text,
            which makes reading faster.

    Raises:
        ValueError: a number is infinite or not a number, for which JSON has no literal.
    """
    fields = (
        f" {json.dumps(name)}: {json.dumps(value, allow_nan=False, sort_keys=sort_keys)}"
        for name, value in content.items()
    )
    return "{\n" + ",\n".join(fields) + "\n}\n"


def verify_checksums(content: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for the first field that differs from what was written."""
    own_name = _name_in(content)
    checksums = content.get(own_name)
    if not isinstance(checksums, Mapping):
        raise ValueError(f"{where}: {own_name} is missing; measure again")
    for name in sorted({*content, *checksums} - {own_name}):
        if name not in content:
            raise ValueError(f"{where}: {name} is missing; measure again")
        if checksums.get(name) != _checksum(content[name]):
            raise ValueError(f"{where}: {name} was changed after it was written; measure again")


def _name_in(content: Mapping[str, Any]) -> str:
    return OLD_CHECKSUMS if OLD_CHECKSUMS in content else CHECKSUMS


def _checksum(value: Any) -> str:
    return _digest(json.dumps(value, sort_keys=True).encode())


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def read_json(path: Path) -> Any:
    """Returns the values in a file, as `parse_json`; raises OSError if it cannot be read."""
    return parse_json(path.read_bytes())[0]


# A field as a line of `to_text`: its text, name, value and the digest of its text.
Field = tuple[bytes, str, Any, str]


def parse_json(content: bytes, known: dict[bytes, Field] | None = None) -> tuple[Any, bool]:
    """Returns the values in JSON, and whether its text already proves that all checksums hold.

    Otherwise `verify_checksums` has to decide.

    Args:
        known: fields of the content that was parsed before. Values whose text is the same are not
            parsed again, so that contents share them.

    Raises:
        ValueError: it is not JSON, or a number is not spelled as Python spells it.
    """
    values = _parse_lines(content, {} if known is None else known)
    if values is not None:
        return values, True
    try:
        return json.loads(content.decode(), parse_float=_exact_float), False
    except RecursionError as error:
        raise ValueError("not JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON as it was written: {error}") from error


def _parse_lines(content: bytes, known: dict[bytes, Field]) -> dict[str, Any] | None:
    """Returns the values in a text of `to_text` if all lines have their checksum.

    None proves nothing: the text may have another layout.
    """
    first, *lines, end = content.split(b"\n") if content.count(b"\n") > 2 else (b"", b"")
    if first != b"{" or end != b"" or lines.pop() != b"}":
        return None
    lines[-1] += b","  # as the others have
    fields = []
    for line in lines:
        start, _, text = line.partition(b'": ')
        field = known.get(start)
        if field is None or field[0] != text:
            if not (start.startswith(b' "') and text.endswith(b",")):
                return None
            try:
                name, value = orjson.loads(start + b'"'), orjson.loads(text[:-1])
            except orjson.JSONDecodeError:  # not JSON, or a number that only Python reads
                return None
            field = known[start] = (text, name, value, _digest(text[:-1]))
        fields.append(field)
    values = {name: value for _, name, value, _ in fields}
    own_name = _name_in(values)
    checksums = values.get(own_name)
    if not isinstance(checksums, dict) or {*checksums, own_name} != values.keys():
        return None
    holds = all(
        name == own_name or checksums[name] == digest or _has_checksum(text[:-1], checksums[name])
        for text, name, _, digest in fields
    )
    return values if holds and len(values) == len(fields) else None


def _has_checksum(text: bytes, checksum: object) -> bool:
    """Records of schema 2 do not sort the names within a field, as its checksum does."""
    if not text.startswith((b"{", b"[{")):
        return False
    lists = text[1:-2].split(b"], ")
    is_flat = text.startswith(b"{") and text.endswith(b"]}")
    if is_flat and text.count(b'"') == 2 * len(lists) == 2 * text.count(b'": ['):
        # Lists of numbers, such as the samples: sorting their text is faster.
        return _digest(b"{" + b"], ".join(sorted(lists)) + b"]}") == checksum
    return _sorted_checksum(text) == checksum


@functools.lru_cache(maxsize=1024)  # records of one machine share fields
def _sorted_checksum(text: bytes) -> str | None:
    """Returns None if Python would write the text differently."""
    value = orjson.loads(text)
    return _checksum(value) if json.dumps(value).encode() == text else None


def _exact_float(text: str) -> float:
    # A changed last digit may stand for the same number, which has the same checksum.
    number = float(text)
    if repr(number) != text:
        raise ValueError(f"{text} was written as {number!r}")
    return number
