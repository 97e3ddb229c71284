"""Tests the file of a SLURM job: its times, and what is refused when it is read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from unitransformer.record.checksums import add_checksums, read_json
from unitransformer.record.slurm_job import (
    JobStart,
    SlurmJob,
    is_job,
    ran_s,
    read_job,
    waited_s,
    write_job,
)

FIRST = JobStart(
    restart=0,
    nodes="node1",
    queued_at="2026-01-01T00:00:00+00:00",
    started_at="2026-01-01T00:01:00+00:00",
    ended_at="2026-01-01T00:11:00+00:00",
    outcome="stopped",
)
SECOND = JobStart(
    restart=1,
    nodes="node2",
    queued_at="2026-01-01T01:11:00+01:00",  # in another zone
    started_at="2026-01-01T00:13:00+00:00",
)
JOB = SlurmJob(job="7", name="5_3", record="a-1.json", starts=(FIRST, SECOND))


def test_waits_and_runs_add_up_over_the_starts_of_a_job() -> None:
    assert waited_s([FIRST]) == 60.0
    assert waited_s([FIRST, SECOND]) == 180.0
    assert ran_s([FIRST]) == 600.0
    assert ran_s([FIRST, SECOND]) is None, "it has not ended"
    assert ran_s([FIRST, replace(SECOND, ended_at="2026-01-01T00:13:05+00:00")]) == 605.0
    assert waited_s([replace(FIRST, queued_at=None), SECOND]) is None
    behind = replace(FIRST, started_at="2025-12-31T23:59:59+00:00")  # the clock of a node
    assert waited_s([behind, SECOND]) == 120.0


def test_the_file_of_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_job(JOB, tmp_path)
    values = read_json(tmp_path / "slurm_7.json")
    assert is_job(values)
    assert read_job(values, "x") == JOB


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"schema": 2}, "x: schema is 2; this version reads 1"),
        ({"starts": []}, "x: starts is empty"),
        ({"starts": [3]}, "x: starts.0 is 3; it must be an object"),
        ({"starts": [{"nodes": "node1"}]}, "x: starts.0: started_at is missing"),
        ({"name": None}, "x: name is None; it must be"),
    ],
)
def test_a_file_that_is_no_job_is_refused_with_its_field(
    changed: dict[str, object], error: str, tmp_path: Path
) -> None:
    write_job(JOB, tmp_path)
    values = json.loads((tmp_path / "slurm_7.json").read_text())
    with pytest.raises(ValueError, match=f"^{error}"):
        read_job(add_checksums(values | changed), "x")
    with pytest.raises(ValueError, match="x: job was changed after it was written"):
        read_job(values | {"job": "8"}, "x")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("started_at", "noon", "x: starts.0: started_at: "),
        ("outcome", "fine", "x: starts.0: outcome is 'fine'; it is unknown"),
        ("restart", "0", "x: starts.0: restart is '0'; it must be"),
    ],
)
def test_a_damaged_start_is_refused_with_its_field(
    field: str, value: object, error: str, tmp_path: Path
) -> None:
    write_job(JOB, tmp_path)
    values = json.loads((tmp_path / "slurm_7.json").read_text())
    values["starts"][0][field] = value
    with pytest.raises(ValueError, match=f"^{error}"):
        read_job(add_checksums(values), "x")
