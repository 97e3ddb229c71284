"""Tests which records are comparable, and how differing conditions are described."""

import copy
from typing import Any

import pytest

from scaling.store.conditions import conditions_of, differences
from unitransformer.record.schema import Record

HOST = {"hostname": "a", "cpu": "Example 9000", "cpu_cores": 2, "device": "cpu", "threads": 2}


def make_record(**changes: Any) -> Record:
    return {
        "code": {"commit": "0123abc", "is_dirty": False},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": [copy.deepcopy(HOST)],
    } | changes


def test_equal_conditions_have_no_differences_and_one_record_has_none_either() -> None:
    assert differences([make_record(), make_record(), make_record()]) == []
    assert differences([make_record()]) == []
    assert differences([]) == []


def test_more_ranks_of_the_same_kind_on_another_host_are_the_same_hardware() -> None:
    more = make_record(hardware=[HOST, HOST | {"hostname": "b"}])
    assert differences([make_record(), more]) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"hardware": [HOST, HOST | {"device": "NVIDIA H200"}]},
            "processors and devices differ: cpu Example 9000, cpu_cores 2, device cpu, threads 2 "
            "(record 1); cpu Example 9000, cpu_cores 2, device NVIDIA H200, threads 2 and "
            "cpu Example 9000, cpu_cores 2, device cpu, threads 2 (record 2)",
        ),
        (
            {"hardware": [HOST | {"float32_matmul_precision": "high"}]},
            "processors and devices differ: cpu Example 9000, cpu_cores 2, device cpu, threads 2 "
            "(record 1); cpu Example 9000, cpu_cores 2, device cpu, threads 2, "
            "float32_matmul_precision high (record 2)",
        ),
        (
            {"versions": {"python": "3.11.7", "torch": "2.14.0"}},
            "versions of torch differ: 2.13.0 (record 1); 2.14.0 (record 2)",
        ),
        (
            {"versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19"}},
            "versions of deepspeed differ: not recorded (record 1); 0.19 (record 2)",
        ),
        (
            {"code": {"commit": "4567def", "is_dirty": False}},
            "commit differ: 0123abc (record 1); 4567def (record 2)",
        ),
        (
            {"code": {"commit": "0123abc", "is_dirty": True}},
            "code may not be its commit: clean (record 1); uncommitted changes (record 2)",
        ),
        (
            {"hardware": [HOST | {"sm_clock_hz": 1.98e9}]},
            "sm_clock_hz differ: not recorded (record 1); 1980 MHz (record 2)",
        ),
    ],
)
def test_each_differing_condition_is_one_line(changes: dict[str, Any], line: str) -> None:
    assert differences([make_record(), make_record(**changes)]) == [line]


def test_dirty_trees_differ_even_where_their_commit_is_the_same() -> None:
    dirty = make_record(code={"commit": "0123abc", "is_dirty": True})
    (line,) = differences([dirty, dirty])
    assert line == "code may not be its commit: uncommitted changes (records 1, 2)"


def test_small_clock_changes_are_equal_conditions_and_throttling_is_not() -> None:
    def at(*clocks_hz: float) -> Record:
        return make_record(hardware=[HOST | {"sm_clock_hz": clock} for clock in clocks_hz])

    assert differences([at(1.98e9), at(1.965e9)]) == []
    (line,) = differences([at(1.98e9, 1.98e9), at(1.98e9, 0.48e9)])
    assert line == "sm_clock_hz differ: 1980 MHz (record 1); 480 to 1980 MHz (record 2)"
    (line,) = differences([at(1.98e9, 0.48e9), at(1.98e9, 0.48e9)])
    assert line == "sm_clock_hz differ among the ranks of every record: 480 to 1980 MHz"


def test_a_hash_of_conditions_is_shared_exactly_where_nothing_differs() -> None:
    def at(*clocks_hz: float, **changes: Any) -> Record:
        ranks = [HOST | {"sm_clock_hz": clock} for clock in clocks_hz]
        return make_record(hardware=ranks, **changes)

    records = [
        *(at(1.98e9), at(1.965e9), at(1.975e9, 1.97e9)),  # within the tolerance
        *(at(1.2e9), at(1.21e9)),
        *(at(1.98e9, versions={"torch": "2.14.0"}), make_record()),
    ]
    hashes = conditions_of(records)
    assert [hashes.index(text) for text in hashes] == [0, 0, 0, 3, 3, 5, 6]
    for one, text in zip(records, hashes, strict=True):
        for other, other_text in zip(records, hashes, strict=True):
            assert (text == other_text) == (differences([one, other]) == [])


def test_records_are_counted_in_the_order_they_are_given() -> None:
    other = make_record(code={"commit": "4567def", "is_dirty": False})
    (line,) = differences([make_record(), other, make_record()])
    assert line == "commit differ: 0123abc (records 1, 3); 4567def (record 2)"
