"""A record that was changed on disk is refused, with the changed field."""

import json
import random
import re
from pathlib import Path

import pytest

from tests.builders.records import make_record
from unitransformer.record.checksums import CHECKSUMS, add_checksums, parse_json, verify_checksums
from unitransformer.record.schema import SCHEMA, load_record, write_record


def test_any_changed_digit_is_noticed_in_its_field(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_record(make_record(), path)
    text = path.read_text()
    body = text[: text.index(f'"{CHECKSUMS}"')]
    digits = [place for place, letter in enumerate(body) if letter.isdigit()]
    for place in random.Random(0).sample(digits, 200):
        other = str((int(text[place]) + 1) % 10)
        path.write_text(text[:place] + other + text[place + 1 :])
        # Every top-level field begins a line with one blank.
        (*_, field) = re.findall(r'^ "(\w+)":', text[:place], flags=re.MULTILINE)
        with pytest.raises(ValueError, match=f"{field} (was changed|is)|was written as"):
            load_record(path)


def test_a_last_digit_that_changes_no_number_is_noticed_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_record(make_record(step_s=[0.1] * 12), path)
    assert float("0.10000000000000001") == 0.1
    path.write_text(path.read_text().replace("0.1,", "0.10000000000000001,", 1))
    with pytest.raises(ValueError, match=r"0\.10000000000000001 was written as 0\.1"):
        load_record(path)


def test_a_digit_that_is_changed_anywhere_in_the_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_record(make_record(), path)
    text = path.read_text()
    digits = [place for place, letter in enumerate(text) if letter in "0123456789"]
    for place in digits[:: len(digits) // 50]:
        path.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}")
        with pytest.raises(ValueError, match=r"a\.json"):
            load_record(path)


def test_a_reformatted_record_is_still_checked_against_its_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    record = write_record(make_record(), path)
    assert parse_json(path.read_bytes()) == (record, True)
    path.write_text(json.dumps(record, indent=4))
    assert parse_json(path.read_bytes()) == (record, False)
    assert load_record(path) == record
    path.write_text(json.dumps(record | {"global_batch_size": 999}, indent=4))
    with pytest.raises(ValueError, match="global_batch_size was changed"):
        load_record(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_record_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_record(make_record(), path)
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(ValueError, match=r"a\.json: not JSON as it was written"):
        load_record(path)


@pytest.mark.parametrize("schema", [1, SCHEMA + 1, None])
def test_a_record_of_another_schema_is_refused(schema: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(add_checksums(make_record(schema=schema))))
    with pytest.raises(ValueError, match=rf"schema is {schema}; this version reads 2 and {SCHEMA}"):
        load_record(path)


def test_an_added_or_removed_field_is_noticed() -> None:
    checked = add_checksums({"a": 1, "b": [2.0]})
    verify_checksums(checked, "record")
    with pytest.raises(ValueError, match="record: c was changed"):
        verify_checksums(checked | {"c": 3}, "record")
    with pytest.raises(ValueError, match="record: b is missing"):
        verify_checksums({name: value for name, value in checked.items() if name != "b"}, "record")
    with pytest.raises(ValueError, match="record: checksums is missing"):
        verify_checksums({"a": 1}, "record")


def test_a_record_with_updated_checksums_after_a_change_is_another_record() -> None:
    once = add_checksums({"a": 1})
    assert add_checksums(once) == once
    assert add_checksums(once | {"a": 2})[CHECKSUMS] != once[CHECKSUMS]
