"""What SLURM has given a job, by its environment, held against what the job is to run."""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm import scheduler
from slurm.job_files import errors_folder
from unitransformer.launch.variables import JOB_FOLDER

SHAPE = ("SLURM_JOB_NUM_NODES", "SLURM_TASKS_PER_NODE")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What SLURM has given this job, by its environment."""

    job: str
    restart: int
    node_list: str
    nodes: int
    tasks_per_node: tuple[int, ...]
    gpus_per_node: int | None
    array: str | None
    task: str | None  # of the array

    @property
    def tasks(self) -> int:
        return sum(self.tasks_per_node)

    @property
    def name(self) -> str:
        """For SLURM's commands. The last task of an array has the array's own id for its job's,
        which would stand for all tasks."""
        return self.job if self.array is None else f"{self.array}_{self.task}"


@dataclass(frozen=True, kw_only=True)
class Words:
    """The command line of the job."""

    target: str
    arguments: Sequence[str]
    folder: Path
    python: str
    srun: Sequence[str]
    local_disk: Path | None


def read_allocation(variables: Mapping[str, str]) -> Allocation:
    """Raises ValueError outside a batch job, and for a task of srun."""
    if "SLURM_JOB_ID" not in variables or any(name not in variables for name in SHAPE):
        raise ValueError(
            "slurm.job is run by a batch job: sbatch slurm/gpt.sbatch, or python -m slurm.submit"
        )
    # Not by SLURM_STEP_ID: who submits from within a job hands that on.
    if int(variables.get("SLURM_PROCID", 0)) > 0:
        raise ValueError(
            "slurm.job starts srun itself; let the batch script run it without srun, once"
        )
    gpus = variables.get("SLURM_GPUS_ON_NODE")
    return Allocation(
        job=variables["SLURM_JOB_ID"],
        restart=int(variables.get("SLURM_RESTART_COUNT", 0)),
        node_list=variables.get("SLURM_JOB_NODELIST", ""),
        nodes=int(variables["SLURM_JOB_NUM_NODES"]),
        tasks_per_node=_repeated(variables["SLURM_TASKS_PER_NODE"]),
        gpus_per_node=int(gpus) if gpus and gpus.isdigit() else None,
        array=variables.get("SLURM_ARRAY_JOB_ID"),
        task=variables.get("SLURM_ARRAY_TASK_ID"),
    )


def _repeated(text: str) -> tuple[int, ...]:
    """8(x2),4 as 8, 8, 4."""
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.removesuffix(")") or 1)
    return tuple(counts)


def read_words(argv: Sequence[str], allocation: Allocation) -> Words:
    """The command line; %a in an argument becomes the number of the array's task."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m slurm.job", description=__doc__)
    parser.add_argument("target", choices=["recipes.gpt", "recipes.bert", "recipes.vit", "sweep"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--srun", action="append", default=[], help="another option of srun")
    parser.add_argument("--local-disk", type=Path, help="folder on every node's own disk")
    own = parser.parse_args(words[:end])
    arguments = words[end + 1 :]
    number = allocation.array or allocation.job
    name = os.environ.get("SLURM_JOB_NAME", own.target.removeprefix("recipes."))
    folder = own.folder or Path(os.environ.get(JOB_FOLDER) or f"runs/slurm/{name}-{number}")
    if allocation.task is not None:
        folder /= f"task-{allocation.task}"
        arguments = [word.replace("%a", allocation.task) for word in arguments]
    return Words(
        target=own.target,
        arguments=arguments,
        folder=folder.absolute(),
        python=own.python,
        srun=own.srun,
        local_disk=own.local_disk,
    )


def errors_of(allocation: Allocation, words: Words) -> Path:
    """Where the ranks of this start leave their words."""
    return errors_folder(words.folder, allocation.job, allocation.restart)


def confirmed(allocation: Allocation) -> Allocation:
    """As the controller knows it: who submits from within a task of an array hands on its number,
    which would be taken for this job's."""
    if allocation.array is None:
        return allocation
    rows = scheduler.show(allocation.job)
    is_task = any(
        (row.get("JobId"), row.get("ArrayTaskId")) == (allocation.job, allocation.task)
        for row in rows
    )
    return allocation if is_task or not rows else replace(allocation, array=None, task=None)


def check_alone(allocation: Allocation, variables: Mapping[str, str]) -> None:
    """Raises ValueError where srun has started several of this process."""
    tasks = int(variables.get("SLURM_STEP_NUM_TASKS", 1))
    # Who submits from within a task of srun hands its number on, to a job that has no step yet.
    if tasks > 1 and scheduler.has_steps(allocation.job):
        raise ValueError(
            f"srun has started slurm.job {tasks} times, and it starts srun itself; let the batch "
            "script run it without srun, once"
        )


def option_of(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of `flag`."""
    found = None
    for index, word in enumerate(arguments):
        if word.startswith(f"{flag}="):
            found = word.partition("=")[2]
        elif word == flag and index + 1 < len(arguments):
            found = arguments[index + 1]
    return found


def check_shape(allocation: Allocation, words: Words) -> None:
    """Raises ValueError, with the numbers, where tasks, nodes, GPUs and options disagree."""
    tasks = allocation.tasks_per_node
    if words.target == "sweep":
        if allocation.nodes > 1:
            raise ValueError(
                f"a sweep's cells run on one node and the job has {allocation.nodes}; "
                "ask for --nodes=1 and more tasks of the array"
            )
        return
    if len(set(tasks)) > 1:
        raise ValueError(
            f"the nodes have {', '.join(map(str, tasks))} tasks; give each as many with "
            "--ntasks-per-node"
        )
    for flag, has, fix in (
        ("--devices", tasks[0], "--ntasks-per-node"),
        ("--num-nodes", allocation.nodes, "--nodes"),
    ):
        asked = option_of(words.arguments, flag)
        if asked is not None and asked != str(has):
            what = "tasks on a node" if flag == "--devices" else "nodes"
            raise ValueError(
                f"{flag} is {asked} and the job has {has} {what}; leave {flag} out, or submit "
                f"with {fix}={asked}"
            )
    gpus = allocation.gpus_per_node
    # A file may say so as well: then the ranks find out by themselves.
    may_be_cpu = option_of(words.arguments, "--accelerator") == "cpu" or (
        option_of(words.arguments, "--config") is not None
    )
    if gpus is not None and not may_be_cpu and gpus != tasks[0]:
        raise ValueError(
            f"the job has {tasks[0]} tasks and {gpus} GPUs on a node, and a rank is a task with a "
            f"GPU; submit with --ntasks-per-node={gpus} --gpus-per-node={gpus}, or other numbers"
        )


CLEAN_S = 20.0


def own_folder(allocation: Allocation, local_disk: Path) -> Path:
    """Of this job alone: what is left of another cannot be taken for its own."""
    return local_disk / f"unitransformer-{allocation.job}"


def clean(allocation: Allocation, local_disk: Path, *, dead_nodes: Sequence[str]) -> None:
    """Remove it on every node that still answers: a job that is queued again may start on others,
    and nobody comes back to these."""
    nodes = allocation.nodes - len(dead_nodes)
    if nodes < 1:
        return
    each = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    if dead_nodes:
        each.append(f"--exclude={','.join(dead_nodes)}")
    place = own_folder(allocation, local_disk)
    with contextlib.suppress(subprocess.SubprocessError):
        subprocess.run(["srun", "--overlap", *each, "rm", "-rf", place], timeout=CLEAN_S)
