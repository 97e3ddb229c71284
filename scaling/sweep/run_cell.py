"""Runs one cell of a sweep and decides its status."""

import contextlib
import datetime
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling import exit_status
from scaling.recipe_process import ProcessResult, Runner
from scaling.store.outcome import CELLS, FILE, CellOutcome
from scaling.sweep.plan import CellTask
from unitransformer.launch.process_tree import count_oom_kills
from unitransformer.launch.variables import PROGRESS_FILE, RUN_FOLDER
from unitransformer.record.schema import Record, Status, load_record

LOG = "log.txt"
LAST_LINES = 12
STOP_S = 1.0  # a signal sent to a cell reaches this process within this time

# Cells share compiled code. A compiler writes its result in place, so that one that is killed
# leaves a truncated file under the name that the next compiler would load. Each cell therefore
# compiles into its own folder, which starts with links to all shared files. A cell that ends well
# shares the files that it has added.
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
CACHE = "compile-cache"
TEMPORARY = (".lock", ".tmp")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of each cell."""

    limit_s: float
    memory_limit_bytes: int | None = None  # None: the machine's memory
    recheck: float = 0.1  # share of the inferred cells to run, at least one per cause; 0: none


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Removes the folder of a cell for another attempt, and restores it if that has no outcome.

    A finished cell stays beside the attempt until then, in a hidden folder, which reports ignore.
    """
    if (folder / FILE).exists():
        folder.rename(_earlier(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        settle_attempts(folder)


def settle_attempts(folder: Path) -> None:
    """Ends what a killed `replacing` has left: only the last attempt with an outcome stays."""
    earlier = _earlier(folder)
    if not earlier.exists():
        return
    if (folder / FILE).exists():
        shutil.rmtree(earlier, ignore_errors=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    # It fails while another process holds files in the folder; the next claim tries it again.
    with contextlib.suppress(OSError):
        earlier.rename(folder)


def _earlier(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.earlier")


def run_cell(task: CellTask, runner: Runner, folder: Path, limits: Limits) -> CellOutcome:
    """Runs a cell in its own new folder; raises OSError for a full or read-only disk."""
    cell_folder = (folder / CELLS / task.name).absolute()
    cell_folder.mkdir(parents=True)
    variables = {RUN_FOLDER: str(cell_folder)}
    shares_code = CACHE_VARIABLE not in os.environ  # otherwise the user chose a cache
    shared_code, code = folder / CACHE, cell_folder / CACHE
    if shares_code:
        share_code(shared_code, code)
        variables[CACHE_VARIABLE] = str(code)
    started_at, start_s = now(), time.monotonic()
    killed_before = count_oom_kills()
    try:
        ended = runner(
            task.cell.recipe,
            task.cell.arguments,
            log=cell_folder / LOG,
            limit_s=limits.limit_s,
            memory_limit_bytes=limits.memory_limit_bytes,
            variables=variables,
        )
    except RuntimeError as error:  # the worker has ended; the next cell starts another
        ended = ProcessResult(exit_code=1, elapsed_s=time.monotonic() - start_s)
        (cell_folder / LOG).write_text(f"error: {error}\n", errors="replace")
    path, record = _read_record(cell_folder)
    if exit_status.is_stopped(ended, record):
        # A batch system signals every process of a job: when the signal reaches this one too, it
        # raises here, and the cell is released without an outcome.
        time.sleep(STOP_S)
    status = exit_status.decide_status(
        ended, record, killed_by_kernel=count_oom_kills() > killed_before
    )
    lines: tuple[str, ...] = ()
    if status != "ok":
        exit_status.check_disk(cell_folder, record)
        lines = _last_lines(cell_folder / LOG, record, folder)
    elif shares_code:
        share_code(code, shared_code)
    # The record and the log stay; the record has the loss curves too.
    for entry in cell_folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
    (cell_folder / PROGRESS_FILE).unlink(missing_ok=True)
    return _outcome(
        task,
        status=status,
        reason=exit_status.explain_status(
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


def outcome_without_run(task: CellTask, cause: str | None) -> CellOutcome:
    """Returns the outcome of a task that `cause` implies is out of memory, or that is refused."""
    if cause is None:
        return _outcome(task, status="refused", reason=task.refusal)
    reason = f"needs at least as much memory as {cause}, which ran out of it"
    return _outcome(task, status="oom-inferred", reason=reason, inferred_from=cause)


def _outcome(task: CellTask, *, status: Status, **fields: Any) -> CellOutcome:
    return CellOutcome(
        cell=task.cell.id,
        repeat=task.repeat,
        recipe=task.cell.recipe,
        options=dict(task.cell.options),
        command=task.cell.command,
        status=status,
        config=task.config,
        **fields,
    )


def _last_lines(log: Path, record: Record | None, folder: Path) -> tuple[str, ...]:
    """Returns the last lines of the rank that failed first, or of the log, without `folder`."""
    lines: Sequence[str] = []
    if record is not None:
        lines = (record["error"] or {}).get("last_lines") or []
    if not lines:
        with contextlib.suppress(OSError):
            lines = log.read_text(errors="replace").splitlines()
    relative = [str(line).replace(f"{folder.absolute()}/", "").rstrip() for line in lines]
    return tuple(line for line in relative if line.strip())[-LAST_LINES:]


def _read_record(cell_folder: Path) -> tuple[Path, Record] | tuple[None, None]:
    for path in sorted(cell_folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            return path, load_record(path)
    return None, None


def share_code(folder: Path, other: Path) -> None:
    """Links the compiled files of a folder into another one, which may have some of them."""
    other.mkdir(parents=True, exist_ok=True)
    for parent, _, names in os.walk(folder):
        for name in names:
            target = other / Path(parent, name).relative_to(folder)
            is_temporary = name.startswith(".") or name.endswith(TEMPORARY)
            if not is_temporary and not target.exists():
                _link(Path(parent, name), target)


def _link(source: Path, target: Path) -> None:
    """Links or copies a file atomically; an existing target stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        copy = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        shutil.copy2(source, copy)
        copy.replace(target)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
