"""What SLURM's own commands say and do: squeue and scontrol; sacct is not needed."""

import getpass
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE_S = 30.0
FIELDS = {"job": "%A", "array": "%F", "task": "%K", "state": "%T", "why": "%r", "left": "%L"}


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job, or a task of an array, in the queue."""

    job: str  # its own id
    array: str  # id of the array, or its own
    task: str  # of the array; N/A outside one, 3-9 for those that have not started
    state: str  # PENDING, RUNNING ...
    why: str  # Resources, Priority, Dependency ...
    left: str  # until the time limit


def call(*words: str) -> "subprocess.CompletedProcess[str]":
    """One of SLURM's commands.

    Raises:
        ValueError: there is no such command here.
        RuntimeError: it does not answer.
    """
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    except FileNotFoundError:
        raise ValueError(
            f"{words[0]} is not installed here; run this where SLURM is, or add --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{words[0]} has not answered for {PATIENCE_S:.0f} s") from None


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """The first line of its error, without the name of the program."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    told = [line.split("error: ", 1)[1] for line in lines if "error: " in line]
    return (told or lines or [f"exit code {done.returncode}"])[0]


def list_queue(jobs: Sequence[str] = ()) -> list[Queued]:
    """The jobs of this user, or those asked for, that SLURM still knows.

    Raises:
        ValueError, RuntimeError: as `call`; or squeue fails.
    """
    form = "|".join(FIELDS.values())
    done = call("squeue", "--noheader", f"--user={getpass.getuser()}", f"--format={form}")
    if done.returncode:
        raise RuntimeError(f"squeue: {said(done)}")
    rows = [
        Queued(**dict(zip(FIELDS, line.strip().split("|"), strict=True)))
        for line in done.stdout.splitlines()
        if line.count("|") == len(FIELDS) - 1
    ]
    return [row for row in rows if not jobs or {row.job, row.array} & {*jobs}]


def is_cancelled(job: str) -> bool:
    """Whether somebody has taken the job back; one at its time limit ends in the same way."""
    try:
        done = call("scontrol", "--oneliner", "show", "job", job)
    except (ValueError, RuntimeError):
        return False
    words = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    ends = words.get("JobState") in ("CANCELLED", "COMPLETING")
    return ends and words.get("Reason") != "TimeLimit"


def requeue(job: str, *, exclude: str | None = None) -> str | None:
    """Queue a job that runs again, under the same id; returns why that cannot be, or None.

    Args:
        exclude: nodes on which it shall not start again.
    """
    try:
        done = call("scontrol", "requeue", job)
        if done.returncode:
            return said(done)
        if exclude:
            call("scontrol", "update", f"JobId={job}", f"ExcNodeList={exclude}")
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None
