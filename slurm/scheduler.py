"""Calls SLURM's commands: squeue, scontrol and sinfo. Does not need sacct."""

import contextlib
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

TIMEOUT_S = 30.0
TRIES, PAUSE_S = 4, 3.0
UNCONFIGURED = re.compile("configuration (source|file)", re.IGNORECASE)
BUSY = re.compile(r"Socket timed out|Unable to contact|Resource temporarily", re.IGNORECASE)
DEFAULT_ARRAY_TASKS = 1001  # MaxArraySize, unless a site sets another
# States of a job that a user cancelled or SLURM requeued, while its batch script still runs.
ENDED_BY_OTHERS = re.compile("CANCELLED|COMPLETING|PENDING|REQUEUED|REQUEUE_HOLD|SPECIAL_EXIT")
USER_DEFAULTS = ("SQUEUE_", "SINFO_", "SCONTROL_")  # variables that filter and format
HELD = re.compile(r"JobHeld|JobHold|\bheld\b")  # reasons of pending jobs that nobody has released
ROW_FORMAT = "%A|%F|%K|%T|%r|%L"  # of `QueueRow`


@dataclass(frozen=True)
class QueueRow:
    """A job, or a task of an array, in the queue."""

    job: str
    array: str  # id of the array; of a job without one, its own id
    task: str  # N/A outside an array; 3-9 for tasks that have not started
    state: str  # PENDING, RUNNING ...
    reason: str  # Resources, Priority, Dependency ...
    left: str  # until the time limit

    @property
    def is_held(self) -> bool:
        """Whether it starts only when somebody releases it."""
        return self.state == "SPECIAL_EXIT" or HELD.search(self.reason) is not None


def call(*command: str, timeout_s: float = TIMEOUT_S) -> "subprocess.CompletedProcess[str]":
    """Runs a command. Raises ValueError if it is not installed, RuntimeError if it hangs."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(USER_DEFAULTS)}
    try:
        return subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            env=env,
        )
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not installed here; use a node that has SLURM") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} has not answered for {timeout_s:.0f} s") from None


def call_patiently(*command: str) -> "subprocess.CompletedProcess[str]":
    """Runs `call` again while the controller is too busy. Raises as `call`."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(RuntimeError):
            ended = call(*command)
            if ended.returncode == 0 or not BUSY.search(ended.stderr):
                return ended
        time.sleep(PAUSE_S)
    return call(*command)


def error_of(ended: "subprocess.CompletedProcess[str]") -> str:
    """Returns the first line of a command's error, without the name of the program."""
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    errors = [line.split("error: ", 1)[1] for line in lines if "error: " in line]
    return (errors or lines or [f"exit code {ended.returncode}"])[0]


def list_queue(users: Iterable[int], *, is_each_task: bool = False) -> list[QueueRow]:
    """Returns the jobs of `users` in the queue. Raises as `call`; RuntimeError if squeue fails.

    Args:
        is_each_task: tasks of an array that have not started have a row each, instead of one.
    """
    names = ",".join(map(str, users))
    options = ["--array"] if is_each_task else []
    ended = call("squeue", "--noheader", *options, f"--user={names}", f"--format={ROW_FORMAT}")
    if ended.returncode:
        raise RuntimeError(f"squeue: {error_of(ended)}")
    rows = [line.strip().split("|") for line in ended.stdout.splitlines()]
    return [QueueRow(*row) for row in rows if len(row) == len(fields(QueueRow))]


def show_job(job: str) -> list[dict[str, str]]:
    """Returns what the controller knows of a job, or of each task of an array. Raises as `call`."""
    ended = call_patiently("scontrol", "--oneliner", "show", "job", job)
    lines = [line.split() for line in ended.stdout.splitlines()]
    return [dict(word.split("=", 1) for word in words if "=" in word) for words in lines]


def has_steps(job: str) -> bool:
    """Returns whether srun has started anything in the job. Raises as `call`."""
    steps = call_patiently("scontrol", "--oneliner", "show", "step", job).stdout
    return re.search(rf"^StepId={re.escape(job)}\.\d+\b", steps, flags=re.MULTILINE) is not None


def is_cancelled_or_requeued(job: str) -> bool:
    """Returns whether a user cancelled the job, or SLURM already requeued it.

    SLURM ends the job in the same way at its time limit, with another reason.
    """
    try:
        (values,) = show_job(job)
    except (ValueError, RuntimeError):
        return False
    is_ended = ENDED_BY_OTHERS.fullmatch(values.get("JobState", ""))
    return is_ended is not None and values.get("Reason") != "TimeLimit"


def is_preempted(job: str) -> bool:
    """Returns whether SLURM has preempted the job, which may still run in its grace time."""
    with contextlib.suppress(ValueError, RuntimeError):
        (values,) = show_job(job)
        return values.get("PreemptTime", "None") != "None"
    return False


def max_array_tasks() -> int:
    """Returns how many tasks an array may have; SLURM's default if the controller is silent."""
    config = ""
    with contextlib.suppress(ValueError, RuntimeError):
        config = call_patiently("scontrol", "show", "config").stdout
    limits = re.findall(r"(?:^MaxArraySize\s*=\s*|\bmax_array_tasks=)(\d+)", config, re.MULTILINE)
    return min(map(int, limits), default=DEFAULT_ARRAY_TASKS)


@dataclass(frozen=True)
class PartitionRow:
    """A node of a partition."""

    name: str
    marked: str  # the name, with * if it is the default partition
    state: str  # up, down, drain, inact
    gres: str  # such as gpu:h200:8(S:0-1),nvme:1; (null) for none
    node: str
    features: str  # separated by commas; (null) for none

    @property
    def gpus(self) -> dict[str, int]:
        """The number of GPUs of a node by type; the type may be empty."""
        gpus: Counter[str] = Counter()
        for item in re.sub(r"\(.*?\)", "", self.gres).split(","):
            name, _, rest = item.partition(":")
            kind, _, number = rest.rpartition(":")
            if name == "gpu" and number.isdecimal():
                gpus[kind] += int(number)
        return dict(gpus)


def list_partitions(names: str | None) -> list[PartitionRow]:
    """Returns the nodes of partitions; no rows if sinfo does not answer.

    `names` are separated by commas; None is the default partition.
    """
    with contextlib.suppress(ValueError, RuntimeError):
        options = ("--noheader", "--all", "--Node", "--format=%R|%P|%a|%G|%N|%f")
        parts = [line.strip().split("|") for line in call("sinfo", *options).stdout.splitlines()]
        rows = [PartitionRow(*part) for part in parts if len(part) == len(fields(PartitionRow))]
        if names is None:
            return [row for row in rows if row.marked.endswith("*")]
        return [row for row in rows if row.name in names.split(",")]
    return []


def closed_partitions(rows: Sequence[PartitionRow]) -> str | None:
    """Returns the states of a job's partitions if none of them starts jobs now."""
    states = sorted({(row.name, row.state) for row in rows})
    if states and all(state != "up" for _, state in states):
        return ", ".join(f"partition {name} is {state}" for name, state in states)
    return None


def expand_nodes(node_list: str) -> list[str]:
    """Returns node[1-2] as node1, node2: in the order of ranks. The first runs the batch script."""
    return call("scontrol", "show", "hostnames", node_list).stdout.split()


def down_nodes(nodes: Sequence[str]) -> list[str]:
    """Returns the nodes that SLURM has declared down. Raises as `call`."""
    ended = call_patiently(
        "sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T"
    )
    states = dict(line.split() for line in ended.stdout.splitlines())
    return [node for node in nodes if states.get(node, "").startswith("down")]


def requeue(job: str, *, restart: int) -> None:
    """Requeues a running job under the same id, unless it has restarted more than `restart` times:
    then SLURM has done it already. Raises as `call`; RuntimeError if SLURM refuses."""
    (values,) = show_job(job)
    if int(values.get("Restarts", 0)) <= restart:
        _check(call_patiently("scontrol", "requeue", job))


def exclude_nodes(job: str, nodes: Sequence[str]) -> None:
    """Adds nodes to those that a pending job avoids. Raises as `requeue`."""
    (values,) = show_job(job)
    before = values.get("ExcNodeList", "(null)")
    excluded = ",".join(nodes if before == "(null)" else [before, *nodes])
    _check(call_patiently("scontrol", "update", f"JobId={job}", f"ExcNodeList={excluded}"))


def _check(ended: "subprocess.CompletedProcess[str]") -> None:
    if ended.returncode:
        raise RuntimeError(error_of(ended))
