"""A batch job in, its script out: plain text, a function of nothing else.

The script asks for nodes and starts `slurm.job`, which does everything that can be tested.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from slurm.clusters import ANY, Cluster

# What SLURM takes for a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:...].
TIME = re.compile(r"\d+(:[0-5]?\d(:[0-5]?\d)?)?|\d+-\d{1,2}(:[0-5]?\d(:[0-5]?\d)?)?")
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # names of jobs, partitions, accounts
WORDS = re.compile(rf"{WORD.pattern}(,{WORD.pattern})*")
LIST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]*")  # of nodes
DEPENDENCY = re.compile(r"singleton|[a-z]+:\d+[0-9:+_]*([,?][a-z]+:\d+[0-9:+_]*)*")
ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%[1-9]\d*)?")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of SLURM, and what runs there.

    Raises:
        ValueError: a value that SLURM would take for something else, by name, with the fix.
    """

    target: str  # recipes.gpt, recipes.bert, recipes.vit or sweep
    arguments: Sequence[str]  # of the recipe or the sweep
    name: str
    folder: str  # where log, markers and results go
    directory: str  # of the repository: where it runs
    python: str  # interpreter of the job
    nodes: int = 1
    devices: int = 8  # GPUs of a node, and ranks on it
    tasks: int | None = None  # on a node, if not one a device
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
    cluster: Cluster = ANY

    def __post_init__(self) -> None:
        for name in ("nodes", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        patterns = {
            "name": (WORD, "letters, digits and . _ + -"),
            "time": (TIME, "a time as SLURM takes it: 30, 2:00:00, 1-12:00:00"),
            "partition": (WORDS, "the name of a partition, or several with commas"),
            "account": (WORD, "the name of an account"),
            "qos": (WORD, "the name of a quality of service"),
            "gpu_type": (WORD, "the type of a GPU, as h200"),
            "exclude": (LIST, "nodes, as node3 or node[3-5]"),
            "dependency": (DEPENDENCY, "as afterok:1234 or singleton"),
            "array": (ARRAY, "as 0-9 or 0-99%4"),
        }
        for name, (pattern, fix) in patterns.items():
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise ValueError(f"{name.replace('_', '-')} is {value!r}; give {fix}")
        for name in ("folder", "directory", "python"):
            value = getattr(self, name)
            if not value or any(sign in value for sign in "\n\r\0\\"):  # sbatch eats backslashes
                raise ValueError(
                    f"{name} is {value!r}, which cannot stand in a batch script; choose another"
                )
        if any("\0" in word for word in self.arguments):
            raise ValueError("arguments hold a zero byte, which no command line can")


def render(job: Job) -> str:
    """The script that `sbatch` is given; every value means itself in it, whatever it holds."""
    parts = [
        "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in _directives(job)),
        _explained(job),
        "".join(f"{line}\n" for line in _settings(job)),
        _command(job),
    ]
    return "\n".join(part for part in parts if part)


def _directives(job: Job) -> list[str]:
    cluster = job.cluster
    gpus = f"{job.gpu_type}:{job.devices}" if job.gpu_type else str(job.devices)
    tasks = job.devices if job.tasks is None else job.tasks
    is_array = job.array is not None
    given = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(tasks),
        "gpus-per-node": gpus if job.on_gpus else None,
        "cpus-per-task": _cpus_per_task(job),
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "exclude": job.exclude,
        "dependency": job.dependency,
        "array": job.array,
        "signal": f"{cluster.signal}@{cluster.signal_ahead_s}",
        "open-mode": "append",
        "output": _pattern(job.folder) + ("/%x-%A_%a.log" if is_array else "/%x-%j.log"),
        "chdir": shlex.quote(job.directory),
    }
    lines = [f"--{name}={value}" for name, value in given.items() if value is not None]
    lines.append("--requeue" if job.requeue else "--no-requeue")
    if job.target == "sweep" and cluster.cpus_per_task is None:
        lines.append("--exclusive")  # or all ranks of a cell share the one core of its one task
    return lines + [_option(option) for option in cluster.extra]


def _cpus_per_task(job: Job) -> str | None:
    """A cluster's are those of a rank; the one task of a sweep starts all ranks of a cell."""
    each = job.cluster.cpus_per_task
    if each is None:
        return None
    return str(each * job.devices if job.target == "sweep" else each)


def _pattern(path: str) -> str:
    """A path in a pattern of file names: sbatch reads quotes as a shell does, and % for itself."""
    return shlex.quote(path.replace("%", "%%"))


def _option(option: str) -> str:
    name, _, value = option.partition("=")
    return f"{name}={shlex.quote(value)}" if value else name


def _explained(job: Job) -> str:
    cluster = job.cluster
    ahead = f"{cluster.signal} comes {cluster.signal_ahead_s} s ahead of the time limit:"
    if job.target == "sweep":
        return (
            "# Each task runs the next cell of the sweep that is not finished.\n"
            f"# {ahead} the cell is given back, and the task\n# is queued again.\n"
        )
    again = "is queued again and goes on from there" if job.requeue else "says how to go on"
    return f"# {ahead} the ranks save after the step they are\n# in, and the job {again}.\n"


def _settings(job: Job) -> list[str]:
    cluster = job.cluster
    lines = [f"module load {shlex.quote(module)}" for module in cluster.modules]
    # Behind the modules, which are not written for it.
    lines = ["set -eo pipefail", *lines, "set -u"] if lines else ["set -euo pipefail"]
    return lines + [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment]


def _command(job: Job) -> str:
    cluster = job.cluster
    own = ["--folder", job.folder]
    if cluster.local_disk:
        own += ["--local-disk", cluster.local_disk]
    if cluster.container:
        places = [job.directory, job.folder, *([cluster.local_disk] if cluster.local_disk else [])]
        mounts = [*cluster.container_mounts, *(f"{place}:{place}" for place in places)]
        own += [
            f"--srun=--container-image={cluster.container}",
            f"--srun=--container-mounts={','.join(mounts)}",
            f"--srun=--container-workdir={job.directory}",
        ]
        if cluster.python:
            own += ["--python", cluster.python]  # the ranks' own, inside the container
    lines = [
        shlex.join([job.python, "-m", "slurm.job"]),
        *_by_option(own),
        shlex.join([job.target, "--"]),
        *_by_option(job.arguments),
    ]
    return "exec " + " \\\n  ".join(lines) + "\n"


def _by_option(arguments: Sequence[str]) -> list[str]:
    """Each option with its value on a line of its own, quoted."""
    lines: list[list[str]] = []
    for word in arguments:
        if word.startswith("--") or not lines:
            lines.append([word])
        else:
            lines[-1].append(word)
    return [shlex.join(line) for line in lines]


def seconds_of(time: str) -> int:
    """What SLURM understands by a time of `TIME`."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # hours, minutes, seconds
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # minutes, seconds
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
