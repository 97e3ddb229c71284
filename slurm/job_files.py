"""What a job leaves in its folder, so that others need not ask SLURM.

All but the script are JSON, and without its suffix: a report takes them for no records.

    submitted      what was asked for, by whoever submitted it
    job.sbatch     the script: `sbatch job.sbatch` goes on in the same folder
    attempt-7-0    each start of job 7: its nodes, how it ended and why
    errors-7-0/    what its ranks have left: failures, signs of life; a sweep its current cell
    run-1/         the run itself: record, checkpoints, logs, progress
    task-3/        the same of one task of an array
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from unitransformer.files import write_atomically

SUBMITTED, SCRIPT, RUN = "submitted", "job.sbatch", "run-1"

Outcome = Literal["running", "done", "stopped", "failed", "refused"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a job, or of a task of an array."""

    job: str
    array: str | None  # that it is a task of
    restart: int
    nodes: str
    started_at: str
    outcome: Outcome = "running"
    reason: str = ""  # in words
    is_requeued: bool = False
    is_node_failure: bool = False  # a node of it has died

    @property
    def since_s(self) -> float:
        """Clock time; what is older is another's. File systems round."""
        return datetime.datetime.fromisoformat(self.started_at).timestamp() - 1


def errors_folder(folder: Path, job: str, restart: int) -> Path:
    """Where the ranks of a start say why they failed, and show that they live."""
    return folder / f"errors-{job}-{restart}"


def write_attempt(folder: Path, attempt: Attempt) -> None:
    """Whole or not at all; raises OSError."""
    path = folder / f"attempt-{attempt.job}-{attempt.restart}"
    write_atomically(path, json.dumps(asdict(attempt), indent=1).encode())


def list_attempts(folder: Path) -> list[Attempt]:
    """Those that can be read, the newest last."""
    found = [read_json(path) for path in folder.glob("attempt-*")]
    names = {item.name for item in fields(Attempt)}
    attempts = [Attempt(**each) for each in found if each is not None and each.keys() == names]
    return sorted(attempts, key=lambda attempt: attempt.started_at)


def last_attempt(folder: Path) -> Attempt | None:
    """The newest that can be read."""
    return next(reversed(list_attempts(folder)), None)


def began_at(folder: Path) -> str:
    """When the first start of a job, or of any task of an array, began; it has been written."""
    attempts = [*list_attempts(folder)]
    for task in folder.glob("task-*"):
        attempts += list_attempts(task)
    return min(attempt.started_at for attempt in attempts)


def find_record(run: Path) -> Path | None:
    """The newest record in the folder of a run."""
    return max(run.glob("*-1.json"), key=lambda path: path.stat().st_mtime, default=None)


def read_json(path: Path) -> dict[str, Any] | None:
    """None if it is not there, or no object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


FILE = "sweep"  # in the folder where the ranks of a start leave their words


@dataclass(frozen=True, kw_only=True)
class Swept:
    """The end of a sweep's process, by its own word."""

    statuses: Mapping[str, int]  # of all cells that are finished
    own: Mapping[str, int]  # of those that it has run
    left: int  # to other processes

    @property
    def is_refused(self) -> bool:
        """Nothing could be measured, by any task."""
        return self.left == 0 and set(self.statuses) == {"refused"}

    def in_words(self) -> str:
        if self.is_refused:
            return f"{in_words(self.statuses)}: its recipes take no cell of this sweep"
        beyond = f", {self.left} left to other tasks" if self.left else ""
        if self.own:
            return f"of its cells {in_words(self.own)}{beyond}"
        return f"nothing was left to run: {in_words(self.statuses) or 'none finished'}{beyond}"


def in_words(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {status}" for status, number in sorted(statuses.items()))


def read_swept(errors: Path) -> Swept | None:
    """None if the sweep did not come to its end."""
    told = read_json(errors / FILE) or {}
    if not {"statuses", "own", "left"} <= told.keys():
        return None
    return Swept(statuses=told["statuses"], own=told["own"], left=told["left"])


def find_cell(errors: Path) -> Path | None:
    """The folder of the cell that runs, or ran last before a sudden end."""
    cell = (read_json(errors / FILE) or {}).get("cell")
    return None if cell is None else Path(cell)
