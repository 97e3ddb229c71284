"""The lines that a run ends with, out of its record."""

import pytest
from test_efficiency import clocked, strong
from test_store import make_run

from recipes.results import measured_lines
from scaling.report.sections.speed import figures_table
from unitransformer.measure.communication import UNTOLD

TRACE = {"rows": [{"part": "communication", "share": 0.25}], "step_s": 0.1, "steps": [40]}


def test_where_the_time_went_is_told_by_the_clock_beside_what_was_traced() -> None:
    two = strong(0.08, 2)
    two.record["trace"] = [TRACE, None]
    assert not any(line.startswith("time") for line in measured_lines(two.record))
    samples = two.record["samples"] | clocked(0.016, 0.012)
    two = make_run(two.record | {"samples": samples}, two.name)
    lines = measured_lines(two.record)
    (time_line,) = (line for line in lines if line.startswith("time"))
    told = "exposed communication 20.0%, 5.0% of the step waiting for the slowest rank"
    assert time_line.endswith(told)
    assert "traced      communication 25.0%" in lines
    assert told in figures_table(two, [])


@pytest.mark.parametrize("reason", [None, UNTOLD.format(strategy="zero2")])
def test_communication_that_is_not_told_says_what_tells_it(reason: str | None) -> None:
    two = strong(0.08, 2)
    two.record["samples_untold"] = {} if reason is None else {"communication_s": reason}
    (row,) = (line for line in figures_table(two, []).splitlines() if "time goes" in line)
    assert "communication is contained in these" in row
    assert "--trace" in row
    assert (reason is None) != ("zero2 waits on streams" in row)
