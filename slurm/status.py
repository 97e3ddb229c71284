"""Prints the state of the jobs in a folder: `python -m slurm.status DIR`.

The states of jobs that left the queue come from their folders, not from sacct.
Exit code: 0 whatever the states; 2 bad usage.
"""

import contextlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
from tabulate import tabulate

from slurm import job_files, scheduler
from slurm.job_files import RUN, SUBMITTED, Attempt, format_counts, list_attempts, read_json
from slurm.runtime.allocation import option_of, sweep_folder_of
from slurm.scheduler import QueueRow
from unitransformer.cli import Parser, explain_parse_error, fail, run_main
from unitransformer.launch.variables import PROGRESS_FILE
from unitransformer.record.slurm_job import ran_s, seconds_of, waited_s

DEPTH = 3  # levels of folders to search
QUIET_S = 600.0  # without progress, after which a running job is reported
WAITING = ("queued", "held", "requeue-hold", "special-exit")  # states of jobs that are to start

Queue = Sequence[QueueRow] | None  # None: squeue failed


class StatusRow(NamedTuple):
    """A row of the table: a job, an array, or a task of an array."""

    job: str
    name: str
    state: str
    step: str
    speed: str
    time_left: str
    waited: str
    ran: str
    requeued: str  # times
    reason: str


class Times(NamedTuple):
    """How long a job waited in the queue and ran, over all its starts and until now.

    None: unknown, as a killed process does not write when it ended.
    """

    waited_s: float | None
    ran_s: float | None
    requeued: int


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = Parser(
        prog="python -m slurm.status",
        description="Lists the jobs in a folder: queued, running, done or failed, and why.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="of one job or of several")
    try:
        print(report(parser.parse_args(argv).folder))
        return 0
    except jsonargparse.ArgumentError as error:
        is_missing = "required" in str(error)
        message = "no folder given: python -m slurm.status runs/slurm"
        return fail(message if is_missing else explain_parse_error(str(error), parser), 2)
    except ValueError as error:
        return fail(str(error), 2)


def report(folder: Path, now_s: float | None = None) -> str:
    """Returns the table of all jobs in `folder` and below; raises ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of one job or of several")
    jobs = find_jobs(folder)
    if not jobs:
        raise ValueError(f"{folder} holds no jobs; slurm.submit prints the folder of each job")
    queue, note = None, ""
    try:
        # A file system may give all files to one owner.
        queue = scheduler.list_queue({os.getuid(), *(job.stat().st_uid for job in jobs)})
    except (ValueError, RuntimeError) as error:
        note = f"\nthe queue is unknown ({error}); the table shows the last states written"
    now_s = time.time() if now_s is None else now_s
    rows = [row for job in jobs for row in describe(job, queue, now_s=now_s)]
    headers = [name.replace("_", " ") for name in StatusRow._fields]
    return tabulate(rows, headers, disable_numparse=True) + note


def find_jobs(folder: Path) -> list[Path]:
    """Returns the folders of jobs, sorted by name. Tasks belong to the folder of their array."""
    paths = {folder}.union(*(folder.glob("*/" * depth) for depth in range(1, DEPTH + 1)))
    jobs = [path for path in paths if path == folder or not path.name.startswith("task-")]
    files = (SUBMITTED, "attempt-*", "task-*/attempt-*")
    return sorted(job for job in jobs if any(any(job.glob(pattern)) for pattern in files))


def describe(folder: Path, queue: Queue, *, now_s: float) -> list[StatusRow]:
    """Returns a row for a job; for an array, its summary and a row per task that is not done."""
    submitted = read_json(folder / SUBMITTED)
    name = str(submitted.get("name", folder.name))
    numbered = ((path.name.removeprefix("task-"), path) for path in folder.glob("task-*"))
    tasks = sorted((int(number), path) for number, path in numbered if number.isdigit())
    if not tasks and submitted.get("array") is None:
        attempts = list_attempts(folder)
        job = str(submitted.get("job") or (attempts and attempts[-1].job) or "?")
        queued = queue and [row for row in queue if row.job == job]
        times = measure(attempts, queued, _submitted_s(submitted), now_s)
        return [_describe_job(folder, job, name, attempts, queued, times, now_s)]
    attempts_of = {number: list_attempts(path) for number, path in tasks}
    started = [attempts[-1] for attempts in attempts_of.values() if attempts]
    array = str(submitted.get("job") or (started and started[-1].array) or "?")
    rows, by_task, all_times = [], dict[str, list[QueueRow]](), []
    for row_of_task in queue or ():
        by_task.setdefault(row_of_task.task, []).append(row_of_task)
    for number, path in tasks:
        attempts, of_task = attempts_of[number], by_task.get(str(number), [])
        # An array that was submitted again has another id.
        ids = {row.array for row in of_task if attempts and row.job == attempts[-1].job} | {array}
        queued = queue and [row for row in of_task if row.array in ids]
        times = measure(attempts, queued, _submitted_s(submitted), now_s)
        all_times.append(times)
        row = _describe_job(path, f"{array}_{number}", name, attempts, queued, times, now_s)
        if row.state != "done":
            rows.append(row)
    queued = queue and [row for row in queue if row.array == array]
    states = {_queue_state(row) for row in queued or ()}
    reasons = [row.reason for row in queued or () if row.state not in ("RUNNING", "COMPLETING")]
    waiting = ", ".join(dict.fromkeys(reason for reason in reasons if reason != "None"))
    outcomes = format_counts(Counter[str](attempt.outcome for attempt in started))
    outcomes = outcomes or (queued == [] and _end_of_log(folder)) or "none has started"
    reason = f"tasks {submitted.get('array', '?')}: {outcomes}"
    if waiting:
        reason += f"; waiting: {waiting}"
    reason += "".join(
        dict.fromkeys(f"; {fix}" for row in queued or () if (fix := _fix(row, array)))
    )
    if queued is None:
        is_running = any(attempt.outcome == "running" for attempt in started)
        state = "running" if is_running else "unknown"
    else:
        state = "ended" if not queued else "running" if started else "queued"
    if len(states) == 1 and states != {"queued"}:
        (state,) = states
    cells = _count_cells(submitted) if submitted.get("target") == "sweep" else ""
    if any(
        row.task not in map(str, attempts_of) for row in queued or ()
    ):  # tasks that never started
        all_times.append(measure([], queued, _submitted_s(submitted), now_s))
    return [StatusRow(array, name, state, cells, "", "", *_format_all(all_times), reason), *rows]


def _submitted_s(submitted: Mapping[str, Any]) -> float | None:
    with contextlib.suppress(ValueError):
        return seconds_of(str(submitted.get("submitted_at")))
    return None


def measure(
    attempts: Sequence[Attempt], queued: Queue, submitted_s: float | None, now_s: float
) -> Times:
    """Returns the times of a job.

    Args:
        attempts: its starts, oldest first.
        submitted_s: clock time at which it was submitted; None: unknown.
    """
    waited, ran = waited_s(attempts), ran_s(attempts) if attempts else None
    last = attempts[-1] if attempts else None
    restarts = {attempt.job: attempt.restart for attempt in attempts}  # its last start counts
    requeued = sum(restarts.values())
    if queued and _queue_state(queued[0]) in WAITING:
        since_s = submitted_s
        if last is not None:
            since_s = None if last.ended_at is None else seconds_of(last.ended_at)
            requeued += 1
        waited = None if waited is None or since_s is None else waited + max(0.0, now_s - since_s)
    elif last is not None and last.outcome == "running" and queued:
        before = ran_s(attempts[:-1])
        ran = None if before is None else before + max(0.0, now_s - seconds_of(last.started_at))
    elif last is None:
        waited = None
    return Times(waited, ran, requeued)


def _format_all(times: Sequence[Times]) -> tuple[str, str, str]:
    """Returns the shortest and the longest time of the tasks of an array, and all requeues."""
    waited = [task.waited_s for task in times if task.waited_s is not None]
    ran = [task.ran_s for task in times if task.ran_s is not None]
    requeued = sum(task.requeued for task in times)
    return _format_range(waited), _format_range(ran), str(requeued) if times else ""


def _format_range(seconds: Sequence[float]) -> str:
    ends = dict.fromkeys(map(_format_time, (min(seconds), max(seconds)) if seconds else ()))
    return " to ".join(ends)


def _count_cells(submitted: Mapping[str, Any]) -> str:
    """Returns how many cells of a sweep have ended, by status."""
    arguments = [str(argument) for argument in submitted.get("arguments", [])]
    cells = Path(sweep_folder_of(arguments, str(submitted.get("directory", "."))), "cells")
    outcomes = [read_json(path) for path in cells.glob("*/outcome.json")]
    if (nodes := option_of(arguments, "--only-nodes")) is not None:  # other arrays have the others
        outcomes = [
            outcome
            for outcome in outcomes
            if outcome.get("options", {}).get("num-nodes", "1") == nodes
        ]
    statuses = Counter(str(outcome.get("status", "damaged")) for outcome in outcomes)
    total = f"{len(outcomes)}/{submitted.get('cells', '?')} cells"
    return f"{total} ({format_counts(statuses)})" if statuses else total


def _describe_job(
    folder: Path,
    job: str,
    name: str,
    attempts: Sequence[Attempt],
    queued: Queue,
    times: Times,
    now_s: float,
) -> StatusRow:
    """Returns the row of a job, or of a task of an array."""
    attempt = attempts[-1] if attempts else None
    state, reason = _state(attempt, queued)
    if state == "gone" and queued is not None:
        reason = _end_of_log(folder) or "left the queue before it started"
    cell = attempt and job_files.find_cell(folder, attempt)
    run = cell or folder / RUN
    progress = read_json(run / PROGRESS_FILE)
    step = speed = time_left = ""
    if {"step", "max_steps", "pace", "left_s"} <= progress.keys():
        record = job_files.find_record(run)
        is_done = state == "done" or ((record and read_json(record)) or {}).get("status") == "ok"
        max_steps, speed = progress["max_steps"], str(progress["pace"])
        step = f"{max_steps if is_done else progress['step']}/{max_steps}"
        if state == "running" and not is_done:
            time_left = _format_time(float(progress["left_s"]))
    if state == "running":
        quiet_s = now_s - float(progress.get("at_s", now_s))
        if quiet_s > QUIET_S:
            reason = f"no progress for {_format_time(quiet_s)}"
        elif queued:
            left = queued[0].left
            no_limit = "no time limit" if left == "UNLIMITED" else ""  # or INVALID, beyond a year
            reason = f"{left} until the time limit" if left[0].isdigit() else no_limit
    spans = _format_all([times]) if attempts or queued else ("", "", "")
    return StatusRow(job, name, state, step, speed, time_left, *spans, reason)


def _state(attempt: Attempt | None, queued: Queue) -> tuple[str, str]:
    """Returns the state of a job and the reason. The queue takes precedence over the folder."""
    is_over = attempt is not None and attempt.outcome != "running"
    if queued and not (is_over and queued[0].state == "COMPLETING"):
        row, state = queued[0], _queue_state(queued[0])
        if state == "running":
            return state, ""
        job = row.job if row.task == "N/A" else f"{row.array}_{row.task}"
        reasons = [text for text in (row.reason, _fix(row, job)) if text not in ("None", "")]
        if attempt and attempt.reason:
            reasons.append(f"before: {attempt.reason}")
        return state, "; ".join(reasons)
    if attempt is None:
        return ("unknown" if queued is None else "gone"), "not started"
    if attempt.outcome == "running" and queued is not None:
        return "lost", f"left the queue; killed, or a node died ({attempt.nodes})"
    return attempt.outcome, attempt.reason


def _fix(row: QueueRow, job: str) -> str:
    """Returns what lets a job go on that waits for a person."""
    state = _queue_state(row)
    if state == "suspended":
        return "SLURM or an administrator resumes it"
    if state == "stopped":
        return f"by a signal; to continue: scancel --signal=CONT {job}"
    if row.reason == "JobHeldAdmin":
        return "an administrator has to release it"
    is_held = state in ("held", "requeue-hold", "special-exit")
    return f"to continue: scontrol release {job}" if is_held else ""


def _end_of_log(folder: Path) -> str:
    """Returns the end of the log of a batch script that has ended before `slurm.job` began."""
    for log in sorted(folder.glob("*.log")):
        with contextlib.suppress(OSError):
            if text := log.read_text(errors="replace").strip():
                return f"{log.name} ends with: {' '.join(text.splitlines()[-1].split())}"
    return ""


def _queue_state(row: QueueRow) -> str:
    """Returns queued, held, or what SLURM says: running, suspended, special-exit ..."""
    if row.state in ("PENDING", "REQUEUED"):
        return (
            "queued" if not row.is_held else "requeue-hold" if "requeued" in row.reason else "held"
        )
    return row.state.lower().replace("_", "-")


def _format_time(seconds: float) -> str:
    """Returns hours, minutes and seconds as SLURM writes them."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


if __name__ == "__main__":
    sys.exit(run_main(main))
