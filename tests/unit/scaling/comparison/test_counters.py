"""Differences of counters in words, and their files."""

from pathlib import Path

import pytest

from scaling.comparison.counters import differences, load_counters, write_counters


def test_equal_counters_have_no_difference() -> None:
    assert differences({"flops": {"a": 3}}, {"flops": {"a": 3}}) == []


def test_a_grown_counter_is_named_with_its_location() -> None:
    before = {"flops": {"head": 100, "layer": 100}}
    now = {"flops": {"head": 104, "layer": 100, "extra": 6}}
    assert differences(before, now) == ["flops grew: 200 -> 210 (+10, +5.00%) at extra +6, head +4"]


def test_a_count_that_moves_to_another_location_is_a_difference() -> None:
    (line,) = differences({"operators": {"a": 1, "b": 2}}, {"operators": {"a": 2, "b": 1}})
    assert line == "operators moved: 3 -> 3 (+0, +0.00%) at a +1, b -1"


def test_a_new_counter_is_reported() -> None:
    assert differences({}, {"graphs": {"f": 2}}) == ["graphs grew: 0 -> 2 (+2) at f +2"]


def test_a_long_list_of_locations_is_shortened() -> None:
    now = {"operators": {str(place): 1 for place in range(6)}}
    assert differences({}, now)[0].endswith("0 +1, 1 +1, 2 +1, 3 +1 and 2 more places")


def test_one_changed_count_is_one_changed_line(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    write_counters({"flops": {"b": 1, "a": 2}}, path)
    first = path.read_text().splitlines()
    assert load_counters(path) == {"flops": {"a": 2, "b": 1}}
    write_counters({"flops": {"b": 1, "a": 3}}, path)
    pairs = zip(first, path.read_text().splitlines(), strict=True)
    assert [pair for pair in pairs if pair[0] != pair[1]] == [('  "a": 2,', '  "a": 3,')]


@pytest.mark.parametrize("text", ['{"speed": {}}', '{"flops": {"a": 1.5}}', "[]"])
def test_a_file_that_holds_something_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "baseline.json").write_text(text)
    with pytest.raises(ValueError, match=r"baseline\.json"):
        load_counters(tmp_path / "baseline.json")
