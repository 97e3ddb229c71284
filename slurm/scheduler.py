"""What SLURM's own commands say and do: squeue and scontrol; sacct is not needed."""

import contextlib
import getpass
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE_S = 30.0
TRIES, PAUSE_S = 4, 3.0  # of what must not be lost because a controller is busy
BUSY = re.compile(r"Socket timed out|Unable to contact|Resource temporarily", re.IGNORECASE)
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


def insist(*words: str) -> "subprocess.CompletedProcess[str]":
    """`call`, again while the controller is too busy to answer; a job hangs on what it says."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(RuntimeError):
            done = call(*words)
            if done.returncode == 0 or not BUSY.search(done.stderr):
                return done
        time.sleep(PAUSE_S)
    return call(*words)


def call(*words: str) -> "subprocess.CompletedProcess[str]":
    """One of SLURM's commands.

    Raises:
        ValueError: there is no such command here.
        RuntimeError: it does not answer.
    """
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    except FileNotFoundError:
        raise ValueError(f"{words[0]} is not installed here; run this where SLURM is") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{words[0]} has not answered for {PATIENCE_S:.0f} s") from None


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """The first line of its error, without the name of the program."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    told = [line.split("error: ", 1)[1] for line in lines if "error: " in line]
    return (told or lines or [f"exit code {done.returncode}"])[0]


def list_queue() -> list[Queued]:
    """The jobs of this user that SLURM still knows.

    Raises:
        ValueError, RuntimeError: as `call`; or squeue fails.
    """
    form = "|".join(FIELDS.values())
    done = call("squeue", "--noheader", f"--user={getpass.getuser()}", f"--format={form}")
    if done.returncode:
        raise RuntimeError(f"squeue: {said(done)}")
    return [
        Queued(**dict(zip(FIELDS, line.strip().split("|"), strict=True)))
        for line in done.stdout.splitlines()
        if line.count("|") == len(FIELDS) - 1
    ]


def show(job: str) -> list[dict[str, str]]:
    """What the controller knows of a job; of an array, task by task.

    Raises:
        ValueError, RuntimeError: as `call`.
    """
    done = insist("scontrol", "--oneliner", "show", "job", job)
    lines = [line.split() for line in done.stdout.splitlines()]
    return [dict(word.split("=", 1) for word in words if "=" in word) for words in lines]


def has_steps(job: str) -> bool:
    """Whether srun has started anything in the job.

    Raises:
        ValueError, RuntimeError: as `call`.
    """
    told = insist("scontrol", "--oneliner", "show", "step", job).stdout
    return re.search(rf"^StepId={re.escape(job)}\.\d+\b", told, flags=re.MULTILINE) is not None


def is_taken_back(job: str) -> bool:
    """Whether somebody has cancelled the job, or SLURM has already queued it again itself: both end
    it in the same way, as its time limit does, which has another reason."""
    try:
        (words,) = show(job)
    except (ValueError, RuntimeError):
        return False
    ends = words.get("JobState") in ("CANCELLED", "COMPLETING", "PENDING")
    return ends and words.get("Reason") != "TimeLimit"


def names_of(node_list: str) -> list[str]:
    """node[1-2] as node1, node2: the order in which ranks are dealt out; the first runs the batch
    script."""
    return call("scontrol", "show", "hostnames", node_list).stdout.split()


def down(names: Sequence[str]) -> list[str]:
    """Which of these nodes SLURM itself takes for dead.

    Raises:
        ValueError, RuntimeError: as `call`.
    """
    done = insist("sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N %T")
    states = dict(line.split() for line in done.stdout.splitlines())
    return [name for name in names if states.get(name, "").startswith("down")]


def requeue(job: str, *, restart: int) -> str | None:
    """Queue a job that runs again, under the same id; returns why that cannot be, or None.

    Args:
        restart: how often it has been before; if SLURM has done it itself, it is not done twice.
    """
    try:
        (words,) = show(job)
        if int(words.get("Restarts", 0)) > restart:
            return None
        done = insist("scontrol", "requeue", job)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return said(done) if done.returncode else None


def avoid(job: str, nodes: Sequence[str]) -> str | None:
    """Let a job that waits start on other nodes than these, beside those it was to avoid before;
    returns why that cannot be, or None."""
    try:
        (words,) = show(job)
        before = words.get("ExcNodeList", "(null)")
        names = [*([] if before == "(null)" else [before]), *nodes]
        done = insist("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(names)}")
    except (ValueError, RuntimeError) as error:
        return str(error)
    return said(done) if done.returncode else None
