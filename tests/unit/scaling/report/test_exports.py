"""Tests rows exported as CSV and JSON."""

import csv
import io
import json
from typing import Any

import pytest

from scaling.report.rows import NAMES, Row, to_csv, to_json


def make_row(**changes: Any) -> Row:
    actual: dict[str, Any] = {"recipe": "gpt", "status": "ok", "unit": "tokens", "command": "x"}
    return Row(**(actual | changes))


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_csv_has_a_header_and_a_line_per_row_with_rfc_4180_line_ends() -> None:
    text = to_csv([make_row(units_per_s=0.1, is_dirty=True), make_row(devices=4)])
    assert text.split("\r\n")[0] == ",".join(NAMES)
    assert text.count("\r\n") == 3
    first, second = read(text)
    assert (first["units_per_s"], first["is_dirty"], first["devices"]) == ("0.1", "true", "")
    assert (second["units_per_s"], second["devices"]) == ("", "4")


def test_text_with_commas_quotes_and_lines_survives_csv_unchanged() -> None:
    actual = 'one, "two"\nthree; ünï'
    assert read(to_csv([make_row(reason=actual)]))[0]["reason"] == actual


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_a_spreadsheet_executes_no_cell_as_a_formula(start: str) -> None:
    actual = f"{start}HYPERLINK(1)"
    assert read(to_csv([make_row(command=actual)]))[0]["command"] == f"'{actual}"


def test_a_negative_number_is_not_escaped_as_a_formula() -> None:
    assert read(to_csv([make_row(validation_loss=-0.5)]))[0]["validation_loss"] == "-0.5"


def test_json_holds_every_field_sorted_and_exact() -> None:
    row = make_row(units_per_s=1 / 3, command="=1 <b>")
    (values,) = json.loads(to_json([row]))
    assert list(values) == sorted(NAMES)
    assert Row(**values) == row


def test_no_rows_are_a_header_and_an_empty_list() -> None:
    assert to_csv([]) == ",".join(NAMES) + "\r\n"
    assert to_json([]) == "[]\n"
