"""Reads what SLURM has allocated to a job, and checks it against the job's command line."""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm import scheduler
from slurm.job_files import errors_folder
from unitransformer.cli import read_path
from unitransformer.launch.variables import JOB_FOLDER

# Paths that a recipe writes outside of the folder of its run.
WRITTEN = ("--record", "--checkpoint-dir", "--trace")
DELETE_S = 20.0  # timeout
SHARED_S = 10.0  # network file systems show a new file after seconds


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What SLURM has allocated to this job."""

    job: str
    restart: int
    node_list: str
    nodes: int
    tasks_per_node: tuple[int, ...]
    gpus_per_node: int | None  # all of a whole node, even if the job requested fewer
    requested_gpus: int | None  # with --gpus-per-node; None if requested in another way
    array: str | None
    task: str | None  # of the array

    @property
    def tasks(self) -> int:
        return sum(self.tasks_per_node)

    @property
    def name(self) -> str:
        """The id for SLURM's commands.

        The job id of an array's last task is the id of the array, which would mean all tasks.
        """
        return self.job if self.array is None else f"{self.array}_{self.task}"


@dataclass(frozen=True, kw_only=True)
class JobArgs:
    """The command line of `slurm.job`, with the paths that follow from it."""

    target: str
    arguments: Sequence[str]
    folder: Path
    errors: Path  # where the ranks of this start report failures
    python: str
    srun: Sequence[str]
    local_disk: Path | None  # folder of this job alone, on the disk of each node
    shared: Path | None = None  # file that every node must see


def read_allocation(variables: Mapping[str, str]) -> Allocation:
    """Raises ValueError outside a batch job, and in a task of srun."""
    if not {"SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_TASKS_PER_NODE"} <= variables.keys():
        raise ValueError(
            "slurm.job runs inside a batch job; submit one: sbatch slurm/gpt.sbatch, "
            "or python -m slurm.submit"
        )
    # SLURM_STEP_ID proves nothing: sbatch inherits it when called inside a job.
    if int(variables.get("SLURM_PROCID", 0)) > 0:
        raise ValueError(
            "slurm.job starts srun itself; run it once in the batch script, without srun"
        )
    gpus = variables.get("SLURM_GPUS_ON_NODE")
    requested = variables.get("SLURM_GPUS_PER_NODE")  # 8, h200:8 or a100:4,h200:4
    return Allocation(
        job=variables["SLURM_JOB_ID"],
        restart=int(variables.get("SLURM_RESTART_COUNT", 0)),
        node_list=variables.get("SLURM_JOB_NODELIST", ""),
        nodes=int(variables["SLURM_JOB_NUM_NODES"]),
        tasks_per_node=_expand_counts(variables["SLURM_TASKS_PER_NODE"]),
        gpus_per_node=int(gpus) if gpus and gpus.isdigit() else None,
        requested_gpus=sum(map(int, re.findall(r"(?<![^:,])\d+(?![^,])", requested or ""))) or None,
        array=variables.get("SLURM_ARRAY_JOB_ID"),
        task=variables.get("SLURM_ARRAY_TASK_ID"),
    )


def _expand_counts(text: str) -> tuple[int, ...]:
    """Reads 8(x2),4 as 8, 8, 4."""
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.removesuffix(")") or 1)
    return tuple(counts)


def drop_inherited_array(allocation: Allocation) -> Allocation:
    """Returns the allocation without an array that this job does not belong to.

    sbatch inherits SLURM_ARRAY_* when called inside an array task, so the controller is asked.
    """
    if allocation.array is None:
        return allocation
    rows = scheduler.show_job(allocation.job)
    tasks = [(row.get("JobId"), row.get("ArrayTaskId")) for row in rows]
    if not rows or (allocation.job, allocation.task) in tasks:
        return allocation
    return replace(allocation, array=None, task=None)


def check_single_process(allocation: Allocation, variables: Mapping[str, str]) -> None:
    """Raises ValueError if srun started this process several times."""
    tasks = int(variables.get("SLURM_STEP_NUM_TASKS", 1))
    # sbatch inherits the number when called inside an srun task, but a new job has no step.
    if tasks > 1 and scheduler.has_steps(allocation.job):
        raise ValueError(
            f"srun has started slurm.job {tasks} times, but slurm.job starts srun itself; run it "
            "once in the batch script, without srun"
        )


def read_args(argv: Sequence[str], allocation: Allocation) -> JobArgs:
    """Reads the command line. In an array, %a in an argument becomes the number of the task."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m slurm.job", description="Runs a recipe or a sweep inside a batch job."
    )
    parser.add_argument("target", choices=["recipes.gpt", "recipes.bert", "recipes.vit", "sweep"])
    parser.add_argument("--folder", type=read_path, help="folder for results")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the ranks")
    parser.add_argument("--srun", action="append", default=[], help="a further option of srun")
    parser.add_argument("--local-disk", type=Path, help="folder on a disk of each node")
    parser.add_argument("--shared", type=Path, help="file that every node of the job must see")
    options = parser.parse_args(argv[:end])
    arguments = list(argv[end + 1 :])
    name = os.environ.get("SLURM_JOB_NAME", options.target.removeprefix("recipes."))
    default_folder = f"runs/slurm/{name}-{allocation.array or allocation.job}"
    folder = (options.folder or Path(os.environ.get(JOB_FOLDER) or default_folder)).absolute()
    if options.target != "sweep":
        count = os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")
        is_array = allocation.task is not None and count != "1"
        check_written_paths(arguments, is_array=is_array)
    if allocation.task is not None:
        folder /= f"task-{allocation.task}"
        arguments = [argument.replace("%a", allocation.task) for argument in arguments]
    disk = options.local_disk
    return JobArgs(
        target=options.target,
        arguments=arguments,
        folder=folder,
        errors=errors_folder(folder, allocation.job, allocation.restart),
        python=options.python,
        srun=options.srun,
        local_disk=None if disk is None else disk / f"unitransformer-{allocation.job}",
        shared=options.shared,
    )


def check_written_paths(arguments: Sequence[str], *, is_array: bool) -> None:
    """Raises ValueError for a path that a recipe would not use in a job, or that all tasks of an
    array would write."""
    if (out := option_of(arguments, "--out")) is not None:
        raise ValueError(
            f"out is {out}, but the run of a job is in the job's folder; leave it out, and give "
            f"slurm.submit --folder, or set {JOB_FOLDER} for sbatch"
        )
    for flag in WRITTEN if is_array else ():
        path = option_of(arguments, flag)
        if path is not None and "%a" not in path:
            raise ValueError(
                f"{flag.removeprefix('--')} is {path}, which every task of the array would write; "
                "put %a, the number of the task, into it"
            )


def flags_of(arguments: Sequence[str]) -> set[str]:
    """Returns --a for both --a and --a=1; further arguments are included as they are."""
    return {argument.partition("=")[0] for argument in arguments}


def option_of(arguments: Sequence[str], flag: str) -> str | None:
    """Returns the last value of `flag`."""
    value = None
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
        elif argument == flag and index + 1 < len(arguments):
            value = arguments[index + 1]
    return value


def sweep_folder_of(arguments: Sequence[str], directory: str) -> str:
    """Returns the folder in which a sweep with these arguments puts its results."""
    study = arguments[0] if arguments and not arguments[0].startswith("--") else "sweep"
    out = option_of(arguments, "--out") or f"sweeps/{Path(study).stem}"
    return str(Path(directory, os.path.expanduser(out)))


def check_shape(allocation: Allocation, args: JobArgs) -> None:
    """Raises ValueError if the numbers of tasks, nodes and GPUs disagree with the options."""
    if args.target == "sweep":
        nodes = option_of(args.arguments, "--only-nodes") or "1"
        if nodes != str(allocation.nodes):
            raise ValueError(
                f"the job has {allocation.nodes} nodes, but it runs the cells on {nodes}: submit "
                f"with --nodes={nodes}, or give --only-nodes {allocation.nodes}"
            )
        return
    tasks, *others = allocation.tasks_per_node
    if any(number != tasks for number in others):
        counts = ", ".join(map(str, allocation.tasks_per_node))
        raise ValueError(
            f"the nodes have {counts} tasks; give all nodes the same number: --ntasks-per-node"
        )
    for flag, fix, number in (
        ("--devices", "--ntasks-per-node", tasks),
        ("--num-nodes", "--nodes", allocation.nodes),
    ):
        value = option_of(args.arguments, flag)
        if value is not None and value != str(number):
            raise ValueError(
                f"{flag} is {value}, but {fix} of the job is {number}; leave {flag} out, or "
                f"submit with {fix}={value}"
            )
    # SLURM gives a job all GPUs of a whole node: beyond the request, they may remain idle.
    gpus = allocation.gpus_per_node
    if gpus is None or gpus > tasks:
        gpus = allocation.requested_gpus
    # A config file may choose the accelerator too; the ranks check it.
    may_use_cpu = option_of(args.arguments, "--accelerator") == "cpu" or (
        option_of(args.arguments, "--config") is not None
    )
    if gpus is not None and gpus != tasks and not may_use_cpu:
        raise ValueError(
            f"the job has {tasks} tasks per node but {gpus} GPUs per node, and each task uses one "
            f"GPU; submit with --ntasks-per-node={gpus}, or request {tasks} GPUs per node"
        )


def check_shared(path: Path) -> None:
    """Raises ValueError if this node does not see a file that was written on another one."""
    deadline = time.monotonic() + SHARED_S
    while not path.exists():
        if time.monotonic() > deadline:
            node = os.environ.get("SLURMD_NODENAME", "this node")
            raise ValueError(
                f"{node} does not see {path}, which another node has written; put the folder of "
                "the sweep on a file system that all nodes share, with --out"
            )
        time.sleep(0.5)


def delete_local_files(allocation: Allocation, path: Path, *, dead_nodes: Sequence[str]) -> None:
    """Deletes `path` on each node that is alive, since a requeued job may use other nodes."""
    nodes = allocation.nodes - len(dead_nodes)
    if nodes < 1:
        return
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    if dead_nodes:
        options.append(f"--exclude={','.join(dead_nodes)}")
    with contextlib.suppress(subprocess.SubprocessError):
        subprocess.run(["srun", "--overlap", *options, "rm", "-rf", path], timeout=DELETE_S)
