"""Tests the lines that a run prints at its end."""

import pytest

from recipes.results import measured_lines
from scaling.report.sections.speed import figures_table
from tests.builders.records import make_record, make_run
from tests.builders.runs import clocked, strong
from unitransformer.config import ParallelConfig
from unitransformer.measure.communication import why_communication_missing

ZERO2 = ParallelConfig(accelerator="cuda", strategy="zero2", devices=2)
TRACE = {"rows": [{"part": "communication", "share": 0.25}], "step_s": 0.1, "steps": [40]}


def test_the_time_breakdown_shows_clock_and_trace() -> None:
    two = strong(0.08, 2)
    two.record["trace"] = [TRACE, None]
    assert not any(line.startswith("time") for line in measured_lines(two.record))
    samples = two.record["samples"] | clocked(0.016, 0.012)
    two = make_run(two.record | {"samples": samples}, two.name)
    lines = measured_lines(two.record)
    (time_line,) = (line for line in lines if line.startswith("time"))
    actual = "exposed communication 20.0%, 5.0% of the step waiting for the slowest rank"
    assert time_line.endswith(actual)
    assert "traced      communication 25.0%" in lines
    assert actual in figures_table(two, [])


@pytest.mark.parametrize("reason", [None, why_communication_missing(ZERO2, "cuda")])
def test_missing_communication_time_names_the_option_that_measures_it(reason: str | None) -> None:
    two = strong(0.08, 2)
    two.record["samples_missing"] = {} if reason is None else {"communication_s": reason}
    (row,) = (line for line in figures_table(two, []).splitlines() if "time goes" in line)
    assert "communication is contained in these" in row
    assert "--trace" in row
    assert (reason is None) != ("zero2 waits on its own GPU streams" in row)


@pytest.mark.parametrize("ceiling_s", [0.0, 1.0])
def test_a_run_without_a_ceiling_names_the_option_that_left_it_out(ceiling_s: float) -> None:
    record = make_run(make_record()).record
    record = record | {"config": record["config"] | {"ceiling_s": ceiling_s}}
    (work,) = (line for line in measured_lines(record) if line.startswith("work"))
    assert ("(not measured: --ceiling-s is 0)" in work) is (ceiling_s == 0)
