"""Renders the batch script of a job. The text depends on the `Job` alone.

The script requests nodes and starts `slurm.job`, which does all the work that tests can reach.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from slurm.clusters import NO_CLUSTER, Cluster

# SLURM's formats: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
TIME = re.compile(r"\d+(:[0-5]?\d(:[0-5]?\d)?)?|\d+-\d{1,2}(:[0-5]?\d(:[0-5]?\d)?)?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
NAMES = re.compile(rf"{NAME.pattern}(,{NAME.pattern})*")
NODES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]*")
DEPENDENCY = re.compile(r"singleton|[a-z]+:\d+[0-9:+_]*([,?][a-z]+:\d+[0-9:+_]*)*")
PATH = re.compile(r"[^\n\r\0\\]+")  # sbatch removes backslashes
ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%[1-9]\d*)?")

# Field of a job -> its format, and the fix in the error message.
FORMATS = {
    "name": (NAME, "letters, digits and . _ + -"),
    **dict.fromkeys(
        ("folder", "directory", "python"), (PATH, "a path without backslashes or line breaks")
    ),
    "time": (TIME, "30 (minutes), 2:00:00 or 1-12:00:00"),
    "partition": (NAMES, "the name of a partition, or several with commas"),
    "account": (NAME, "the name of an account"),
    "qos": (NAME, "the name of a quality of service"),
    "gpu_type": (NAME, "the type of a GPU, such as h200"),
    "exclude": (NODES, "nodes, such as node3 or node[3-5]"),
    "dependency": (DEPENDENCY, "one such as afterok:1234 or singleton"),
    "array": (ARRAY, "task numbers, such as 0-9 or 0-99%4"),
}
# Fields that are options of sbatch under the same name.
PASSED_ON = ("time", "partition", "account", "qos", "exclude", "dependency", "array")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The resources to request from SLURM, and the command to run with them.

    Raises ValueError, with its name and the fix, for a value that SLURM would misread.
    """

    target: str  # recipes.gpt, recipes.bert, recipes.vit or sweep
    arguments: Sequence[str]  # of the recipe or the sweep
    name: str
    folder: str  # for the log, the state of the job, and results
    directory: str  # in which the job runs: the repository
    python: str  # interpreter
    nodes: int = 1
    devices: int = 8  # GPUs per node, and ranks per node
    on_gpus: bool = True
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpu_type: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    array: str | None = None
    cells: int | None = None  # of a sweep
    requeue: bool = True
    cluster: Cluster = NO_CLUSTER

    def __post_init__(self) -> None:
        for name, number in (("nodes", self.nodes), ("devices", self.devices)):
            if number < 1:
                raise ValueError(f"{name} is {number}; it must be at least 1")
        for name, (pattern, fix) in FORMATS.items():
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise ValueError(f"{name.replace('_', '-')} is {value!r}; give {fix}")
        if any("\0" in argument for argument in self.arguments):
            raise ValueError("arguments contain a zero byte, which no command line can hold")


def render(job: Job) -> str:
    """Returns the script for `sbatch`. Every value is quoted, whatever it contains."""
    directives = "\n".join(f"#SBATCH {line}" for line in _directives(job))
    settings = "\n".join(_settings(job.cluster))
    return f"#!/bin/bash\n{directives}\n\n{_comment(job)}\n{settings}\n\n{_command(job)}"


def _directives(job: Job) -> list[str]:
    cluster, is_sweep = job.cluster, job.target == "sweep"
    gpus = f"{job.gpu_type}:{job.devices}" if job.gpu_type else str(job.devices)
    cpus = cluster.cpus_per_task
    if cpus is not None and is_sweep:
        cpus *= job.devices  # the one task starts all ranks of a cell
    # sbatch interprets % in file names, and quotes as a shell does.
    log_folder = shlex.quote(job.folder.replace("%", "%%"))
    values = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1 if is_sweep else job.devices,
        "gpus-per-node": gpus if job.on_gpus else None,
        "cpus-per-task": cpus,
        **{name: getattr(job, name) for name in PASSED_ON},
        "signal": f"{cluster.signal}@{cluster.signal_ahead_s}",
        "open-mode": "append",
        "output": f"{log_folder}/{'%x-%j' if job.array is None else '%x-%A_%a'}.log",
        "chdir": shlex.quote(job.directory),
    }
    lines = [f"--{name}={value}" for name, value in values.items() if value is not None]
    lines.append("--requeue" if job.requeue else "--no-requeue")
    if is_sweep and cpus is None:
        lines.append("--exclusive")  # otherwise all ranks of a cell share the core of its one task
    for option in cluster.extra:
        name, _, value = option.partition("=")
        lines.append(f"{name}={shlex.quote(value)}" if value else name)
    return lines


def _comment(job: Job) -> str:
    signal = f"{job.cluster.signal} arrives {job.cluster.signal_ahead_s} s before the time limit:"
    if job.target == "sweep":
        return (
            "# Each task runs the next unfinished cell of the sweep.\n"
            f"# {signal} the task releases its cell\n# and is queued again.\n"
        )
    then = "is queued again and resumes from there" if job.requeue else "prints how to continue"
    return f"# {signal} the ranks save after the current\n# step, and the job {then}.\n"


def _settings(cluster: Cluster) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment]
    if not cluster.modules:
        return ["set -euo pipefail", *exports]
    modules = [f"module load {shlex.quote(module)}" for module in cluster.modules]
    # Modules may read unset variables.
    return ["set -eo pipefail", *modules, "set -u", *exports]


def _command(job: Job) -> str:
    cluster = job.cluster
    options = ["--folder", job.folder]
    if cluster.local_disk:
        options += ["--local-disk", cluster.local_disk]
    if cluster.container:
        paths = (job.directory, job.folder, cluster.local_disk)
        mounts = [*cluster.container_mounts, *(f"{path}:{path}" for path in paths if path)]
        options += [
            f"--srun=--container-image={cluster.container}",
            f"--srun=--container-mounts={','.join(mounts)}",
            f"--srun=--container-workdir={job.directory}",
        ]
        if cluster.python:
            options += ["--python", cluster.python]  # of the ranks, inside the container
    lines = [
        shlex.join([job.python, "-m", "slurm.job"]),
        *_one_option_per_line(options),
        shlex.join([job.target, "--"]),
        *_one_option_per_line(job.arguments),
    ]
    return "exec " + " \\\n  ".join(lines) + "\n"


def _one_option_per_line(arguments: Sequence[str]) -> list[str]:
    """Returns quoted lines, each an option with its values."""
    lines: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or not lines:
            lines.append([argument])
        else:
            lines[-1].append(argument)
    return [shlex.join(line) for line in lines]


def seconds_of(time: str) -> int:
    """Converts a time in one of SLURM's formats (`TIME`)."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:  # minutes[:seconds]
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
