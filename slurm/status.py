"""`python -m slurm.status DIR`: folders of jobs in, a table of what became of them out.

What the queue does not know any more is told by what the jobs left in their folders; sacct is not
asked. 0 whatever the jobs did | 2 bad usage.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
from tabulate import tabulate

from slurm import scheduler
from slurm.job_files import (
    RUN,
    SUBMITTED,
    Attempt,
    errors_folder,
    find_cell,
    find_record,
    in_words,
    last_attempt,
    read_json,
)
from slurm.runtime.allocation import option_of
from slurm.scheduler import Queued
from unitransformer.cli import fail
from unitransformer.launch.variables import PROGRESS_FILE

DEPTH = 3  # folders below the one that is named
QUIET_S = 600.0  # without a line from a running job, which is then said


@dataclass(frozen=True, kw_only=True)
class Line:
    """A job, or a task of an array, as a person wants to see it."""

    job: str
    name: str
    state: str
    step: str = ""
    speed: str = ""
    left: str = ""
    starts: int = 0
    why: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Look and print; returns the exit code."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m slurm.status",
        description="What is queued, running, done and failed of the jobs in a folder, and why.",
        exit_on_error=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="of one job, or of several")
    try:
        folder = parser.parse_args(sys.argv[1:] if argv is None else list(argv)).folder
        print(report(folder))
        return 0
    except jsonargparse.ArgumentError as error:
        told = "no folder given: python -m slurm.status runs/slurm"
        is_missing = "required" in str(error)
        return fail(told if is_missing else str(error), 2)
    except ValueError as error:
        return fail(str(error), 2)


def report(folder: Path, now_s: float | None = None) -> str:
    """The table of all jobs at or below `folder`.

    Raises:
        ValueError: there is no such folder, or no job in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name that of a job, or of several")
    jobs = find_jobs(folder)
    if not jobs:
        raise ValueError(f"{folder} holds no jobs; slurm.submit says where it puts them")
    note = ""
    try:
        queued = scheduler.list_queue()
    except (ValueError, RuntimeError) as error:
        queued, note = [], f"\nthe queue is not known ({error}): states are those last written"
    lines = [
        line
        for each in jobs
        for line in describe(each, queued, knows_queue=not note, now_s=now_s or time.time())
    ]
    rows = [
        [line.job, line.name, line.state, line.step, line.speed, line.left, line.starts, line.why]
        for line in lines
    ]
    headers = ["job", "name", "state", "step", "speed", "left", "starts", "why"]
    return tabulate(rows, headers, disable_numparse=True) + note


def find_jobs(folder: Path) -> list[Path]:
    """Folders of jobs, by name; those of an array's tasks belong to the array."""
    found = []
    for path in [folder, *(p for depth in range(1, DEPTH + 1) for p in folder.glob("*/" * depth))]:
        is_job = (path / SUBMITTED).exists() or any(path.glob("attempt-*"))
        is_array = any(path.glob("task-*/attempt-*"))
        is_task = path != folder and path.name.startswith("task-")
        if (is_job or is_array) and not is_task:
            found.append(path)
    return sorted(set(found))


def describe(
    folder: Path, queued: Sequence[Queued], *, knows_queue: bool, now_s: float
) -> list[Line]:
    """A line for the job of `folder`, or for each task of its array."""
    submitted = read_json(folder / SUBMITTED) or {}
    found = [(path.name.removeprefix("task-"), path) for path in folder.glob("task-*")]
    tasks = [path for number, path in sorted(found) if number.isdigit()]
    tasks.sort(key=lambda path: int(path.name.removeprefix("task-")))
    name = str(submitted.get("name", folder.name))
    if not tasks and submitted.get("array") is None:
        attempt = last_attempt(folder)
        job = str(submitted.get("job") or (attempt and attempt.job) or "?")
        own = [row for row in queued if row.job == job]
        return [_line(folder, job, name, attempt, own, knows_queue=knows_queue, now_s=now_s)]
    attempts = [attempt for path in tasks if (attempt := last_attempt(path)) is not None]
    array = str(submitted.get("job") or (attempts and attempts[-1].array) or "?")
    lines = [_summary(folder, submitted, array, name, queued)]
    for task in tasks:
        number = task.name.removeprefix("task-")
        attempt = last_attempt(task)
        ids = {row.array for row in queued if attempt and row.job == attempt.job} | {array}
        own = [row for row in queued if row.array in ids and row.task == number]
        line = _line(
            task, f"{array}_{number}", name, attempt, own, knows_queue=knows_queue, now_s=now_s
        )
        if line.state != "done":
            lines.append(line)
    return lines


def _summary(
    folder: Path, submitted: Mapping[str, Any], array: str, name: str, queued: Sequence[Queued]
) -> Line:
    """The line of a whole array."""
    own = [row for row in queued if row.array == array]
    outcomes: Counter[str] = Counter(
        attempt.outcome for path in folder.glob("task-*") if (attempt := last_attempt(path))
    )
    waits = ", ".join(dict.fromkeys(row.why for row in own if row.state == "PENDING"))
    told = in_words(outcomes) or "none has started"
    state = "queued" if own and not outcomes else "running" if own else "ended"
    cells = _cells(submitted)
    return Line(
        job=array,
        name=name,
        state=state,
        step=cells,
        why=f"tasks {submitted.get('array', '?')}: {told}" + (f"; waits: {waits}" if waits else ""),
    )


def _cells(submitted: Mapping[str, Any]) -> str:
    """How many cells of a sweep have ended, and how."""
    if submitted.get("target") != "sweep":
        return ""
    arguments = [str(word) for word in submitted.get("arguments", [])]
    study = arguments[0] if arguments and not arguments[0].startswith("--") else "sweep"
    out = option_of(arguments, "--out") or f"sweeps/{Path(study).stem}"
    place = Path(str(submitted.get("directory", "."))) / out / "cells"
    found = [read_json(path) or {} for path in place.glob("*/outcome.json")]
    statuses = Counter(str(outcome.get("status", "damaged")) for outcome in found)
    told = in_words(statuses)
    number = f"{len(found)}/{submitted.get('cells', '?')}"
    return f"{number} cells" + (f" ({told})" if told else "")


def _line(
    folder: Path,
    job: str,
    name: str,
    attempt: Attempt | None,
    own: Sequence[Queued],
    *,
    knows_queue: bool,
    now_s: float,
) -> Line:
    starts = len(list(folder.glob("attempt-*")))
    state, why = _state(attempt, own, knows_queue=knows_queue)
    run = _find_run(folder, attempt)
    step, speed, left = _progress(run, state)
    if state == "running":
        told = read_json(run / PROGRESS_FILE) or {}
        quiet_s = now_s - float(told.get("at_s", now_s))
        if quiet_s > QUIET_S:
            why = f"nothing said for {_clock(quiet_s)}"
        elif own:
            why = f"{own[0].left} until its time limit"
    return Line(
        job=job, name=name, state=state, step=step, speed=speed, left=left, starts=starts, why=why
    )


def _find_run(folder: Path, attempt: Attempt | None) -> Path:
    """Of the job, or of the cell that its sweep runs."""
    cell = attempt and find_cell(errors_folder(folder, attempt.job, attempt.restart))
    return cell or folder / RUN


def _state(attempt: Attempt | None, own: Sequence[Queued], *, knows_queue: bool) -> tuple[str, str]:
    """What a job does, and why; the queue knows better than what was written last."""
    if own:
        before = f"; before: {attempt.reason}" if attempt and attempt.reason else ""
        row = own[0]
        match row.state:
            case "PENDING" | "REQUEUED" | "REQUEUE_HOLD":
                return "queued", f"{row.why}{before}"
            case "RUNNING" | "SUSPENDED" | "CONFIGURING":
                return "running", ""
            case "COMPLETING" if attempt is None or attempt.outcome == "running":
                return "ending", before.removeprefix("; ")
    if attempt is None:
        return "gone", "it left the queue without a start" if knows_queue else "not started"
    if attempt.outcome == "running" and knows_queue:
        return (
            "lost",
            f"it left the queue without a word: killed, or a node failed ({attempt.nodes})",
        )
    return attempt.outcome, attempt.reason


def _progress(run: Path, state: str) -> tuple[str, str, str]:
    told = read_json(run / PROGRESS_FILE)
    if told is None or not {"step", "max_steps", "pace", "left_s"} <= told.keys():
        return "", "", ""
    path = find_record(run)
    record = (path and read_json(path)) or {}
    if state == "done" or record.get("status") == "ok":
        return f"{told['max_steps']}/{told['max_steps']}", str(told["pace"]), ""
    left = _clock(float(told["left_s"])) if state == "running" else ""
    return f"{told['step']}/{told['max_steps']}", str(told["pace"]), left


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds as SLURM writes them."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main())
