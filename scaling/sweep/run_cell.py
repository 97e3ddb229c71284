"""One cell of a sweep, run and judged: a task goes in, its outcome out."""

import contextlib
import datetime
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.exit_status import (
    check_disk,
    count_oom_kills,
    decide_status,
    explain_status,
    is_stopped,
)
from scaling.recipe_process import ProcessResult, Runner
from scaling.store.outcome import CELLS, Outcome
from scaling.sweep import compile_cache
from scaling.sweep.plan import CellTask
from unitransformer.launch.variables import PROGRESS_FILE, RUN_FOLDER
from unitransformer.record.schema import Record, Status, load_record

LOG = "log.txt"

LAST_LINES = 12

STOP_S = 1.0  # that a signal sent to the cell may take to reach this process


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a cell may take."""

    limit_s: float
    memory_limit_bytes: int | None = None  # None: the machine's
    recheck: float = 0.1  # share of the cells that another settles which run anyway, one at least


def run_cell(task: CellTask, runner: Runner, folder: Path, limits: Limits) -> Outcome:
    """Run it in its own folder below the sweep's; what an earlier attempt has left there goes.

    Raises:
        OSError: the disk is full or was made read-only.
    """
    place = (folder / CELLS / task.name).absolute()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    variables = {RUN_FOLDER: str(place)}
    shares_code = compile_cache.VARIABLE not in os.environ  # else it is the user's own affair
    if shares_code:
        compile_cache.link_shared(folder / compile_cache.FOLDER, place / compile_cache.FOLDER)
        variables[compile_cache.VARIABLE] = str(place / compile_cache.FOLDER)
    started_at, start_s = now(), time.monotonic()
    killed_before = count_oom_kills()
    try:
        ended = runner(
            task.cell.recipe,
            task.cell.arguments,
            log=place / LOG,
            limit_s=limits.limit_s,
            memory_limit_bytes=limits.memory_limit_bytes,
            variables=variables,
        )
    except RuntimeError as error:  # the worker itself has ended; the next cell starts another
        ended = ProcessResult(exit_code=1, elapsed_s=time.monotonic() - start_s)
        (place / LOG).write_text(f"error: {error}\n")
    path, record = _read_record(place)
    if is_stopped(ended, record):
        # By what a batch system sends to every process it is on its way to this one too, and then
        # the cell is given back, without an outcome.
        time.sleep(STOP_S)
    status = decide_status(ended, record, killed_by_kernel=count_oom_kills() > killed_before)
    if status != "ok":
        check_disk(place, record)
    elif shares_code:
        compile_cache.publish(place / compile_cache.FOLDER, folder / compile_cache.FOLDER)
    lines = () if status == "ok" else _last_lines(place / LOG, record, folder)
    _tidy(place)
    return _outcome(
        task,
        status=status,
        reason=explain_status(
            status,
            ended,
            record,
            lines,
            limit_s=limits.limit_s,
            memory_limit_bytes=limits.memory_limit_bytes,
        ),
        exit_code=ended.exit_code,
        elapsed_s=ended.elapsed_s,
        started_at=started_at,
        last_lines=lines,
        record=None if path is None else path.name,
    )


def outcome_without_run(task: CellTask, cause: str | None) -> Outcome:
    """The outcome of a task that need not run.

    Args:
        cause: the cell whose lack of memory settles it; None: the recipe refuses it.
    """
    if cause is None:
        return _outcome(task, status="refused", reason=task.refusal)
    return _outcome(
        task,
        status="oom-inferred",
        reason=f"needs at least as much memory as {cause}, which ran out of it",
        inferred_from=cause,
    )


def _outcome(task: CellTask, *, status: Status, **facts: Any) -> Outcome:
    return Outcome(
        cell=task.cell.id,
        repeat=task.repeat,
        recipe=task.cell.recipe,
        options=dict(task.cell.options),
        command=task.cell.command,
        status=status,
        config=task.config,
        **facts,
    )


def _last_lines(log: Path, record: Record | None, folder: Path) -> tuple[str, ...]:
    """Of the rank that failed first, by its record; else of what the cell said. No place of this
    machine is in them."""
    said: Sequence[str] = []
    if record is not None:
        said = (record["error"] or {}).get("last_lines") or []
    if not said:
        with contextlib.suppress(OSError):
            said = log.read_text(errors="replace").splitlines()
    lines = [str(line).replace(f"{folder.absolute()}/", "").rstrip() for line in said]
    return tuple(line for line in lines if line.strip())[-LAST_LINES:]


def _read_record(place: Path) -> tuple[Path, Record] | tuple[None, None]:
    """The record that a run has left in its folder."""
    for path in sorted(place.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            return path, load_record(path)
    return None, None


def _tidy(place: Path) -> None:
    """Keep record and log; curves are in the record."""
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    (place / PROGRESS_FILE).unlink(missing_ok=True)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
