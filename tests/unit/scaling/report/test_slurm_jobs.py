"""Tests the page on the SLURM jobs of a report, and its line in RESULTS.md."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from scaling.__main__ import main
from scaling.store.outcome import load_outcome
from scaling.store.reader import Store, load_store
from scaling.sweep.claims import JOB_ID
from tests.builders.records import make_record
from tests.builders.reports import make_store, pages_of
from tests.builders.sweeps import make_study, make_tasks, work
from unitransformer.record.schema import write_record
from unitransformer.record.slurm_job import JobStart, SlurmJob, write_job

START = JobStart(
    restart=0,
    nodes="node1",
    queued_at="2026-01-01T00:00:00+00:00",
    started_at="2026-01-01T00:01:00+00:00",
    ended_at="2026-01-01T00:21:00+00:00",
    outcome="done",
)


def job_of(number: int, *starts: JobStart, record: str | None = None) -> SlurmJob:
    return SlurmJob(job=str(number), name=f"5_{number}", record=record, starts=starts)


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep whose cells ran in job 9, a run in job 10, and a job without runs."""
    monkeypatch.setenv(JOB_ID, "9")
    work(tmp_path / "night", make_tasks(make_study()))
    jobs = tmp_path / "night/jobs"
    jobs.mkdir()
    again = replace(
        START,
        restart=1,
        queued_at="2026-01-01T00:21:00+00:00",
        started_at="2026-01-01T01:21:00+00:00",
        ended_at="2026-01-01T02:01:00+00:00",
    )
    write_job(job_of(9, replace(START, outcome="stopped"), again), jobs)
    write_job(job_of(11, replace(START, ended_at=None, outcome="running")), jobs)
    write_record(make_record("gpt"), tmp_path / "gpt/run-1/a-1.json")
    write_job(job_of(10, START, record="a-1.json"), tmp_path / "gpt/run-1")
    return tmp_path


def load(folder: Path) -> Store:
    return load_store([folder], relative_to=folder)


def test_every_job_has_a_row_with_its_times_and_runs(swept: Path) -> None:
    store = load(swept)
    assert {cell.outcome.slurm_job for cell in store.cells} == {"9"}
    pages = pages_of(store)
    rows = [line for line in pages["slurm-jobs.md"].splitlines() if line.startswith("| [")]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0].partition("]")[0] for row in cells] == ["[5_10", "[5_9", "[5_11"]
    ten, nine, eleven = (row[1:] for row in cells)
    assert ten[:5] == ["", "60 s", "20 min", "0", "done"]
    assert ten[5] == "[1](../gpt/run-1/a-1.json)"
    assert nine[:5] == ["night", "61 min", "60 min", "1", "done"]
    assert nine[5].count("](../night/cells/") == 3
    assert nine[5].endswith(", 7 more")
    assert eleven == ["night", "60 s", "", "0", "not yet, or killed", ""]
    line = "- 3 SLURM jobs waited 60 s to 61 min, ran 80 min together and were requeued once: "
    assert f"{line}[slurm-jobs.md](pages/slurm-jobs.md)" in " ".join(
        pages["RESULTS.md"].split("\n  ")
    )


def test_a_report_without_jobs_says_nothing_of_them() -> None:
    pages = pages_of(make_store(make_record()))
    assert "slurm-jobs.md" not in pages
    assert "SLURM" not in pages["RESULTS.md"]


def test_a_changed_file_of_a_job_is_left_out_as_damaged(swept: Path) -> None:
    path = swept / "night/jobs/slurm_9.json"
    path.write_text(path.read_text().replace("01:21:00", "00:22:00"))
    (damaged,) = load(swept).left_out
    assert (damaged.name, damaged.kind) == ("night/jobs/slurm_9.json", "damaged")
    assert damaged.reason.endswith("starts was changed after it was written; measure again")


def test_an_outcome_of_an_older_version_names_no_job(swept: Path) -> None:
    path = next(swept.glob("night/cells/*/outcome.json"))
    values = json.loads(path.read_text())
    del values["slurm_job"], values["checksums"]["slurm_job"]
    path.write_text(json.dumps(values))
    assert load_outcome(path).slurm_job is None


def test_lint_accepts_a_report_with_jobs(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(swept), "--out", str(swept / "RESULTS.md")]) == 0
    assert main(["lint", str(swept / "RESULTS.md")]) == 0
    assert "0 errors" in capsys.readouterr().out
