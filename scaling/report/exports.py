"""Writes the rows of a report as CSV or JSON text, the same for equal rows."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from scaling.report.rows import NAMES, Row

# A spreadsheet runs text that begins with one of these (OWASP, "CSV injection").
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def to_csv(rows: Sequence[Row]) -> str:
    """Returns a header and a line for each row (RFC 4180); missing values are blank.

    Text that a spreadsheet would run as a formula begins with an apostrophe.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(NAMES)
    writer.writerows([_cell(getattr(row, name)) for name in NAMES] for row in rows)
    return file.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return str(value)


def to_json(rows: Sequence[Row]) -> str:
    """Returns a list of objects in the order of the rows, names sorted, missing values null."""
    values = [vars(row) for row in rows]
    return json.dumps(values, sort_keys=True, indent=1, allow_nan=False) + "\n"
