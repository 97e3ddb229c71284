"""Reads and writes the files in the folder of a job, which replace questions to SLURM.

Apart from the script and the run, they are JSON without a suffix, so that a report does not take
them for records.

    submitted      the job as it was submitted
    job.sbatch     the script; `sbatch job.sbatch` continues in the same folder
    attempt-7-0    a start of job 7: its nodes, its outcome and the reason
    errors-7-0/    files of its ranks: failures, stops, heartbeats; the current cell of a sweep
    run-1/         the run: record, checkpoints, logs, progress; the times of the job, for a report
    task-3/        the same files for one task of an array
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from unitransformer.files import why_not_writable, write_atomically
from unitransformer.record.slurm_job import JobStart, seconds_of

SUBMITTED, SCRIPT, RUN = "submitted", "job.sbatch", "run-1"
STUDY = "study.json"  # in the folder of a sweep
# In the errors folder of a start:
SWEEP_STATE = "sweep"
SIGNAL = "signal-"  # and the number of a rank: a signal to stop has arrived there
STEP = "step"  # number of the step in which the ranks run
JOB_END = "job-end"  # why a job of several nodes has to end: `outcome`, `reason`, `dead_nodes`


@dataclass(frozen=True, kw_only=True)
class Attempt(JobStart):
    """One start of a job, or of one task of an array."""

    job: str
    array: str | None  # id of the array that the task belongs to
    reason: str = ""
    is_requeued: bool = False
    is_node_failure: bool = False

    @property
    def since_s(self) -> float:
        """Clock time before which no file is from this start. File systems round times."""
        return seconds_of(self.started_at) - 1


def errors_folder(folder: Path, job: str, restart: int) -> Path:
    """Returns the folder in which the ranks of a start report failures and heartbeats."""
    return folder / f"errors-{job}-{restart}"


def write_attempt(folder: Path, attempt: Attempt) -> None:
    path = folder / f"attempt-{attempt.job}-{attempt.restart}"
    write_atomically(path, json.dumps(asdict(attempt), indent=1).encode())


def list_attempts(folder: Path) -> list[Attempt]:
    """Returns the readable attempts, oldest first."""
    found = [read_json(path) for path in folder.glob("attempt-*")]
    names = {field.name for field in fields(Attempt)}
    required = {field.name for field in fields(Attempt) if field.default is MISSING}
    attempts = [Attempt(**values) for values in found if required <= values.keys() <= names]
    return sorted(attempts, key=lambda attempt: attempt.started_at)


def last_attempt(folder: Path) -> Attempt | None:
    return next(reversed(list_attempts(folder)), None)


def check_free(folder: Path) -> None:
    """Raises ValueError if the folder belongs to another job, or cannot be written."""
    if list_attempts(folder) or (folder / SUBMITTED).exists():
        raise ValueError(
            f"folder {folder} belongs to another job; continue that job with sbatch "
            f"{shlex.quote(str(folder / SCRIPT))}, or choose another --folder"
        )
    if closed := why_not_writable(folder):
        parent, reason = closed
        raise ValueError(
            f"folder {folder}: {parent} cannot be written ({reason}); choose another --folder"
        )


def first_started_at(folder: Path) -> str:
    """Returns when the job, or any task of its array, first started. It must have started."""
    folders = [folder, *folder.glob("task-*")]
    return min(attempt.started_at for path in folders for attempt in list_attempts(path))


def find_record(run: Path) -> Path | None:
    """Returns the newest record in the folder of a run."""
    return max(run.glob("*-1.json"), key=lambda path: path.stat().st_mtime, default=None)


def read_json(path: Path) -> dict[str, Any]:
    """Returns an empty dict if the file is missing, damaged, or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True, kw_only=True)
class SweepEnd:
    """What a sweep's process wrote when it ended."""

    statuses: Mapping[str, int]  # number of finished cells per status
    own: Mapping[str, int]  # of these, the ones that this process ran
    left: int  # cells that are not finished

    @property
    def is_refused(self) -> bool:
        """Whether the recipes refuse all cells, so that no task can run any."""
        return self.left == 0 and set(self.statuses) == {"refused"}

    def format(self) -> str:
        if self.is_refused:
            return f"{format_counts(self.statuses)}: the recipes refuse every cell of this sweep"
        others = f"; {self.left} left" if self.left else ""
        if self.own:
            return f"cells of this task: {format_counts(self.own)}{others}"
        return f"no cells left to run: {format_counts(self.statuses) or 'none finished'}{others}"


def format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))


def read_sweep_end(errors: Path) -> SweepEnd | None:
    """Returns None if the sweep has not ended by itself."""
    state = read_json(errors / SWEEP_STATE)
    if not {"statuses", "own", "left"} <= state.keys():
        return None
    return SweepEnd(statuses=state["statuses"], own=state["own"], left=state["left"])


def find_cell(folder: Path, attempt: Attempt) -> Path | None:
    """Returns the folder of the cell that a sweep runs, or ran when it was killed."""
    errors = errors_folder(folder, attempt.job, attempt.restart)
    cell = read_json(errors / SWEEP_STATE).get("cell")
    return None if cell is None else Path(cell)
