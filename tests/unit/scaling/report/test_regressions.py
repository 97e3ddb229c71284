"""Tests that RESULTS.md shows the self-test of comparisons, and that lint derives it again."""

from dataclasses import replace
from pathlib import Path

import pytest

from scaling.__main__ import main
from scaling.comparison.self_test import write
from scaling.lint.check import lint
from scaling.store.self_test import read_self_test
from tests.builders.records import make_record
from tests.builders.reports import make_store, pages_of
from tests.builders.self_tests import SLOWDOWNS, make_self_test, make_times
from unitransformer.record.checksums import add_checksums
from unitransformer.record.schema import write_record


def test_the_answer_of_the_newest_self_test_stands_before_a_row_for_each_rule() -> None:
    equal = make_times(8, dict.fromkeys(SLOWDOWNS, 1.0))
    contents = {
        "runs/old.json": make_self_test(equal, started_at="2025-01-01T00:00:00+00:00"),
        "runs/new.json": make_self_test(),
    }
    tests = [read_self_test(c, name, checksums_hold=True) for name, c in contents.items()]
    store = replace(make_store(make_record()), self_tests=tuple(tests))
    text = pages_of(store)["RESULTS.md"]
    section = text.partition("## Regression checks")[2].partition("\n## ")[0]
    assert " ".join(section.split()).startswith(
        "**Beside 2 busy processes, compare called equal steps slower or faster in 0 of 20 "
        "trials, and found 5 % more work in 20 and 2 % in 20.**"
    )
    heads = "| rule | false alarms | 5 % caught | 2 % caught | inconclusive |"
    assert heads in section
    assert "| pytest-benchmark, mean:5% | 0 of 20 | " in section
    assert section.count(" of 20 | never |") == 4
    assert "(runs/new.json)" in section
    assert "old.json" not in section
    assert "compare --self-test --trials 20" in section
    assert "--out" not in section  # the folder of the record changes no result
    assert "2 self-tests of regression checks" in " ".join(text.split())


def test_broken_promises_are_part_of_the_answer() -> None:
    content = make_self_test(make_times(8, dict.fromkeys(SLOWDOWNS, 1.0)))
    tests = (read_self_test(content, "a.json", checksums_hold=True),)
    text = pages_of(replace(make_store(make_record()), self_tests=tests))["RESULTS.md"]
    assert "Broken: 5 % more work is called slower; 2 % more" in " ".join(text.split())


def test_without_a_self_test_there_is_no_section() -> None:
    assert "Regression checks" not in pages_of(make_store(make_record()))["RESULTS.md"]


def test_lint_finds_a_result_that_the_times_contradict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, report = tmp_path / "runs", tmp_path / "RESULTS.md"
    write_record(make_record(), runs / "a.json")
    content = make_self_test()
    write(content, runs / "self-test.json")
    command = ["report", str(runs), "--out", str(report)]
    assert main(command) == 0
    assert "1 self-test" in capsys.readouterr().out
    assert lint(report).errors == ()
    content["rules"][1]["found_5_percent"] = 20
    write(add_checksums(content), runs / "self-test.json")
    assert main(command) == 0
    found = [what for where, what in lint(report).errors if where == "runs/self-test.json"]
    assert len(found) == 1
    assert "found_5_percent is 20 in the record" in found[0]
