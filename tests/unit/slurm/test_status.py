"""Tests `slurm.status`: job states from the queue and from job folders."""

import datetime
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm import status
from slurm.job_files import Attempt, errors_folder, last_attempt, write_attempt
from slurm.scheduler import QueueRow
from tests.builders.slurm import ATTEMPT, PutStub
from unitransformer.launch.variables import PROGRESS_FILE


def queued(
    state: str,
    reason: str = "Priority",
    *,
    number: str = "7",
    task: str = "N/A",
    left: str = "1:00:00",
) -> QueueRow:
    return QueueRow(job=number, array=number, task=task, state=state, reason=reason, left=left)


@pytest.mark.parametrize(
    ("outcome", "row", "state", "expected"),
    [
        ("running", queued("RUNNING"), "running", "1:00:00 until the time limit"),
        ("stopped", queued("PENDING"), "queued", "Priority; before: so it was"),
        ("stopped", None, "stopped", "so it was"),
        ("failed", None, "failed", "so it was"),
        ("done", None, "done", "so it was"),
        ("running", None, "lost", "killed, or a node died (node[1-2])"),
        (
            "running",
            queued("COMPLETING", "NonZeroExitCode"),
            "completing",
            "NonZeroExitCode; before",
        ),
        ("done", queued("COMPLETING"), "done", "so it was"),
        ("running", queued("RUNNING", left="UNLIMITED"), "running", "no time limit"),
        ("running", queued("RUNNING", left="INVALID"), "running", "1:01:40 "),
        (
            "running",
            queued("STOPPED", "None"),
            "stopped",
            "continue: scancel --signal=CONT 7; before",
        ),
        ("running", queued("CONFIGURING"), "configuring", "Priority; before: so it was"),
        ("running", queued("RESV_DEL_HOLD"), "resv-del-hold", "Priority"),
        ("stopped", queued("REQUEUED", "None"), "queued", "before: so it was"),
        (
            "stopped",
            queued("PENDING", "JobHeldUser"),
            "held",
            "JobHeldUser; to continue: scontrol release 7; before: so it was",
        ),
        (
            "stopped",
            queued("PENDING", "JobHeldAdmin"),
            "held",
            "JobHeldAdmin; an administrator has to release it; before: so it was",
        ),
        (
            "failed",
            queued("SPECIAL_EXIT", "job requeued in special state"),
            "special-exit",
            "job requeued in special state; to continue: scontrol release 7; before: so it was",
        ),
        (
            "failed",
            queued("REQUEUE_HOLD", "JobHeldUser", task="2"),
            "requeue-hold",
            "JobHeldUser; to continue: scontrol release 7_2; before",
        ),
        (
            "failed",  # as squeue shows it
            queued("PENDING", "job requeued in held state"),
            "requeue-hold",
            "job requeued in held state; to continue: scontrol release 7; before: so it was",
        ),
        (
            "failed",
            queued("PENDING", "launch failed requeued held"),
            "requeue-hold",
            "launch failed",
        ),
        (
            "failed",
            queued("PENDING", "JobHoldMaxRequeue"),
            "held",
            "JobHoldMaxRequeue; to continue",
        ),
        ("running", queued("PENDING", "QOSUsageThreshold"), "queued", "QOSUsageThreshold; before"),
        (
            "running",
            queued("SUSPENDED", "None"),
            "suspended",
            "SLURM or an administrator resumes it",
        ),
    ],
)
def test_the_status_of_a_job_comes_from_the_queue_and_its_folder(
    outcome: str,
    row: QueueRow | None,
    state: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "gpt"
    write_attempt(folder, replace(ATTEMPT, outcome=outcome, reason="so it was"))  # type: ignore[arg-type]
    (folder / "run-1").mkdir()
    progress = {"step": 3, "max_steps": 9, "pace": "5.0 ms/step", "left_s": 3700, "at_s": 100.0}
    (folder / "run-1" / PROGRESS_FILE).write_text(json.dumps(progress))
    monkeypatch.setattr("slurm.scheduler.list_queue", lambda _: [] if row is None else [row])
    line = status.report(tmp_path, now_s=101.0).splitlines()[-1]
    assert re.search(rf"\b7 +gpt +{state} ", line), line
    assert expected in line
    assert ("3/9" if state != "done" else "9/9") in line
    assert ("1:01:40" in line) == (state == "running")


def start(**fields: Any) -> Attempt:
    """A start of job 7 with times in seconds, of which None is unknown."""
    for name in ("queued_at", "started_at", "ended_at"):
        if (seconds := fields.get(name)) is not None:
            fields[name] = datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
    return replace(ATTEMPT, **fields)


STOPPED = start(queued_at=0, started_at=60, ended_at=90, outcome="stopped")


@pytest.mark.parametrize(
    ("starts", "row", "expected"),
    [
        ([], queued("PENDING"), ("1:50", "", "0")),
        ([], None, ("", "", "")),
        ([STOPPED], None, ("1:00", "0:30", "0")),
        ([STOPPED], queued("PENDING"), ("1:20", "0:30", "1")),
        ([STOPPED], queued("PENDING", "JobHeldUser"), ("1:20", "0:30", "1")),
        (
            [STOPPED, start(queued_at=90, started_at=100, restart=1)],
            queued("RUNNING"),
            ("1:10", "0:40", "1"),
        ),
        ([STOPPED, start(queued_at=90, started_at=100, restart=1)], None, ("1:10", "", "1")),
        ([STOPPED, start(started_at=100, ended_at=105, restart=1)], None, ("", "0:35", "1")),
        # Of another job in the same folder, and of a node whose clock is behind.
        ([STOPPED, start(job="9", queued_at=99, started_at=98, ended_at=99, outcome="done")], None,
         ("1:00", "0:31", "0")),
        ([start(queued_at=0, started_at=60)], queued("PENDING"), ("", "", "1")),
    ],
)  # fmt: skip
def test_the_status_of_a_job_says_how_long_it_waited_ran_and_was_requeued(
    starts: list[Attempt],
    row: QueueRow | None,
    expected: tuple[str, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submitted = {"job": "7", "name": "gpt", "submitted_at": "1970-01-01T00:00:00+00:00"}
    (tmp_path / "submitted").write_text(json.dumps(submitted))
    for attempt in starts:
        write_attempt(tmp_path, attempt)
    monkeypatch.setattr("slurm.scheduler.list_queue", lambda _: [] if row is None else [row])
    actual = status.describe(tmp_path, [] if row is None else [row], now_s=110.0)[0]
    assert (actual.waited, actual.ran, actual.requeued) == expected


def test_the_row_of_an_array_has_the_range_of_its_tasks_and_all_requeues(tmp_path: Path) -> None:
    submitted = {"job": "7", "array": "0-3", "submitted_at": "1970-01-01T00:00:00+00:00"}
    (tmp_path / "submitted").write_text(json.dumps(submitted))
    write_attempt(tmp_path / "task-0", replace(STOPPED, outcome="done"))
    write_attempt(tmp_path / "task-1", replace(STOPPED, outcome="done"))
    again = start(queued_at=90, started_at=100, ended_at=110, restart=1, outcome="done")
    write_attempt(tmp_path / "task-1", again)
    (array,) = status.describe(tmp_path, [], now_s=200.0)
    assert (array.waited, array.ran, array.requeued) == ("1:00 to 1:10", "0:30 to 0:40", "1")
    pending = [queued("PENDING", task="2-3")]
    (array,) = status.describe(tmp_path, pending, now_s=200.0)
    assert (array.waited, array.ran) == ("1:00 to 3:20", "0:30 to 0:40")


def test_starts_of_an_older_version_have_no_times(tmp_path: Path) -> None:
    old = {"job": "7", "array": None, "restart": 1, "nodes": "node1", "outcome": "done"}
    old |= {"started_at": ATTEMPT.started_at, "reason": "", "is_requeued": False}
    (tmp_path / "attempt-7-1").write_text(json.dumps(old | {"is_node_failure": False}))
    (row,) = status.describe(tmp_path, [], now_s=0.0)
    assert (row.state, row.waited, row.ran, row.requeued) == ("done", "", "", "1")


@pytest.mark.parametrize("out", ["out", "~/out"])
def test_the_status_of_an_array_shows_cells_done_running_and_pending(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    actual = {
        "job": "5", "name": "s", "target": "sweep", "arguments": ["quick", "--out", out],
        "array": "0-8%2", "cells": 9, "directory": str(tmp_path),
    }  # fmt: skip
    folder = tmp_path / "job"
    attempt = replace(ATTEMPT, array="5")
    write_attempt(folder / "task-0", attempt)
    (folder / "submitted").write_text(json.dumps(actual))
    cells = tmp_path / "out/cells"
    for name in ("done", "runs"):
        (cells / name).mkdir(parents=True)
    (cells / "done/outcome.json").write_text('{"status": "ok"}')
    progress = {"step": 3, "max_steps": 9, "pace": "5.0 ms/step", "left_s": 70, "at_s": 100.0}
    (cells / "runs" / PROGRESS_FILE).write_text(json.dumps(progress))
    errors = errors_folder(folder / "task-0", attempt.job, attempt.restart)
    errors.mkdir()
    (errors / "sweep").write_text(json.dumps({"cell": str(cells / "runs")}))
    rows = [queued("RUNNING", task="0"), queued("PENDING", number="5", task="1-8")]
    rows = [replace(row, array="5") for row in rows]
    monkeypatch.setattr("slurm.scheduler.list_queue", lambda _: rows)
    array, task = status.report(folder, now_s=101.0).splitlines()[2:]
    assert re.search(r"running +1/9 cells \(1 ok\) ", array)
    assert array.endswith("tasks 0-8%2: 1 running; waiting: Priority")
    assert re.search(r"5_0 +s +running +3/9 +5.0 ms/step +1:10 ", task)


@pytest.mark.parametrize(
    ("states", "state", "waiting"),
    [
        ([("PENDING", "Priority")], "queued", "; waiting: Priority"),
        (
            [("PENDING", "JobHeldUser"), ("PENDING", "JobHeldUser")],
            "held",
            "; waiting: JobHeldUser; to continue: scontrol release 5",
        ),
        (
            [("PENDING", "Resources"), ("PENDING", "JobHeldUser")],
            "queued",
            "; waiting: Resources, JobHeldUser; to continue: scontrol release 5",
        ),
        ([("SUSPENDED", "None")], "suspended", "; SLURM or an administrator resumes it"),
        ([("COMPLETING", "None")], "completing", ""),
        (
            [("SPECIAL_EXIT", "JobHeldUser")],
            "special-exit",
            "; waiting: JobHeldUser; to continue: scontrol release 5",
        ),
        ([], "ended", ""),
    ],
)
def test_an_array_has_the_state_that_all_its_tasks_share(
    states: list[tuple[str, str]],
    state: str,
    waiting: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "submitted").write_text(json.dumps({"job": "5", "name": "s", "array": "0-8"}))
    rows = [queued(*both, number="5", task=str(task)) for task, both in enumerate(states)]
    monkeypatch.setattr("slurm.scheduler.list_queue", lambda _: rows)
    (line,) = status.report(tmp_path, now_s=0.0).splitlines()[2:]
    assert re.search(rf"\b5 +s +{state} ", line), line
    assert line.endswith(f"tasks 0-8: none has started{waiting}")


@pytest.mark.parametrize("array", [None, "0-3"])
def test_a_script_that_ends_before_its_ranks_is_shown_with_the_end_of_its_log(
    array: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = {"job": "5", "name": "s", "array": array}
    (tmp_path / "submitted").write_text(json.dumps(submitted))
    monkeypatch.setattr("slurm.scheduler.list_queue", lambda _: [])
    assert ("left the queue before it started" in status.report(tmp_path)) == (array is None)
    (tmp_path / "gpt-5.log").write_text("loaded\njob.sbatch: line 17: SCRATCH: not set\n")
    ends = "gpt-5.log ends with: job.sbatch: line 17: SCRATCH: not set"
    assert status.report(tmp_path).endswith(ends)


def test_the_queue_of_the_jobs_owners_is_asked_without_the_users_defaults(
    tmp_path: Path, put_stub: PutStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_attempt(tmp_path, ATTEMPT)
    put_stub("squeue", 'echo "$SQUEUE_STATES $*" > asked; echo "7|7|N/A|RUNNING|None|1:00:00"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("LOGNAME", "nobody")
    assert re.search(r"\b7 .* running ", status.report(tmp_path))
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith(f" --noheader --user={tmp_path.stat().st_uid} ")


def test_a_running_job_without_output_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_attempt(tmp_path, ATTEMPT)
    (tmp_path / "run-1").mkdir()
    progress = {"step": 3, "max_steps": 9, "pace": "", "left_s": 1, "at_s": 0.0}
    (tmp_path / "run-1" / PROGRESS_FILE).write_text(json.dumps(progress))
    monkeypatch.setattr("slurm.scheduler.list_queue", lambda _: [queued("RUNNING")])
    assert "no progress for 1:00:00" in status.report(tmp_path, now_s=3600.0)


def test_without_a_queue_the_status_is_the_last_one_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_: object) -> list[QueueRow]:
        raise RuntimeError("squeue has not answered for 30 s")

    write_attempt(tmp_path, ATTEMPT)
    monkeypatch.setattr("slurm.scheduler.list_queue", silent)
    actual = status.report(tmp_path)
    assert "the queue is unknown (squeue has not answered for 30 s)" in actual
    assert "running" in actual


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [(["running", "done"], "running"), (["done"], "unknown"), ([], "unknown")],
)
def test_without_a_queue_an_array_has_not_ended(
    outcomes: list[str], state: str, tmp_path: Path
) -> None:
    (tmp_path / "submitted").write_text(json.dumps({"job": "5", "name": "s", "array": "0-8"}))
    (tmp_path / "s-5_0.log").write_text("the end of another task\n")
    for number, outcome in enumerate(outcomes):
        attempt = replace(ATTEMPT, array="5", outcome=outcome, ended_at=ATTEMPT.started_at)
        write_attempt(tmp_path / f"task-{number}", attempt)
    array, *tasks = status.describe(tmp_path, None, now_s=0.0)
    assert array.state == state
    assert "ends with" not in array.reason
    assert all(task.state == "running" for task in tasks)


def test_without_a_queue_a_job_that_has_not_started_is_not_gone(tmp_path: Path) -> None:
    (tmp_path / "submitted").write_text(json.dumps({"job": "5", "name": "s"}))
    (row,) = status.describe(tmp_path, None, now_s=0.0)
    assert (row.state, row.reason) == ("unknown", "not started")


def test_a_damaged_marker_is_ignored(tmp_path: Path) -> None:
    write_attempt(tmp_path, ATTEMPT)
    (tmp_path / "attempt-7-1").write_text("{")
    assert last_attempt(tmp_path) == ATTEMPT


@pytest.mark.parametrize(("argv", "expected"), [(["/nowhere"], "not a folder"), ([], "no folder")])
def test_status_refuses_a_folder_that_is_not_a_job(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert status.main(argv) == 2
    assert expected in capsys.readouterr().err
    assert status.main([str(tmp_path)]) == 2
    assert "holds no jobs" in capsys.readouterr().err
