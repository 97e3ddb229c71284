"""Renders the batch script of a job. The text depends on the `Job` alone.

The script requests nodes and starts `slurm.job`, which does all the work that tests can reach.
"""

import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from slurm.clusters import CONTROL, NO_CLUSTER, NOT_UTF_8, VARIABLE, Cluster

# SLURM's formats: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]],
# where a number may exceed 59. These words mean no limit, and so does zero.
TIME = re.compile("-1|infinite|unlimited|([0-9]+-)?[0-9]+(:[0-9]+){0,2}", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
# Sites differ in what they allow. Only what could change the script or be an option is refused.
TEXT = re.compile(rf"(?!-)[^{CONTROL}]+")
GPU_TYPE = re.compile(rf"(?!-)[^{CONTROL}\s:,=()]+")
# A list of hosts: names with numbers in brackets, such as node3, rack[1-2]node[01-16,20].
NODES = re.compile(r"(?!-)([A-Za-z0-9._-]|\[[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*\]|,(?!,|\Z))+")
# A slice of a GPU: 1g.10gb, a100_3g.20gb, 2g20gb.
MIG_SLICE = re.compile(r"(?:\A|[^0-9a-z])[0-9]+g[._-]?[0-9]+gb", re.IGNORECASE)
DEPENDENCY = re.compile(r"(singleton|[a-z]+:\d+[0-9:+_]*)([,?](singleton|[a-z]+:\d+[0-9:+_]*))*")
PATH = re.compile(rf"[^\n\r\0\\{NOT_UTF_8}]+")  # sbatch removes backslashes
IN_QUOTES = re.compile(rf'{VARIABLE.pattern}|[\\"$`]', re.ASCII)
GRES, EXCLUSIVE = "--gres=", "--exclusive"
LONGEST_S = 24_855 * 86_400  # SLURM's 32 bits wrap around beyond, without an error
MOST = 65_535  # nodes, devices of a node, tasks at once: from 32 bits on, sbatch wraps around
ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%[1-9]\d*)?")

# Field of a job -> its format, and the fix in the error message.
FORMATS = {
    "name": (NAME, "at most 100 letters, digits and . _ + -"),
    **dict.fromkeys(
        ("folder", "directory", "python", "shared"),
        (PATH, "a UTF-8 path without backslashes or line breaks"),
    ),
    "time": (TIME, "30 (minutes), 2:00:00, 1-12:00:00 or UNLIMITED"),
    "partition": (TEXT, "the name of a partition, or several with commas"),
    "account": (TEXT, "the name of an account"),
    "qos": (TEXT, "the name of a quality of service"),
    "constraint": (TEXT, "features of nodes, such as h200 or [rack1|rack2]"),
    "gpu_type": (GPU_TYPE, "the type of a GPU, such as h200"),
    "exclude": (NODES, "nodes, such as node3 or node[3-5,8]"),
    "dependency": (DEPENDENCY, "one such as afterok:1234 or singleton"),
    "array": (ARRAY, "task numbers, such as 0-9 or 0-99%4"),
}
# Fields that are options of sbatch under the same name.
PASSED_ON = ("partition", "account", "qos", "constraint", "exclude", "dependency", "array")


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
    constraint: str | None = None
    gpu_type: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    array: str | None = None
    cells: int | None = None  # of a sweep, on so many nodes
    left: int | None = None  # of these, the ones without an outcome when the job was rendered
    shared: str | None = None  # file of a sweep's folder that its nodes must see
    requeue: bool = True
    cluster: Cluster = NO_CLUSTER

    def __post_init__(self) -> None:
        for name, number in (("nodes", self.nodes), ("devices", self.devices)):
            if number < 1:
                raise ValueError(f"{name} is {number}; it must be at least 1")
            if number > MOST:
                raise ValueError(f"{name} is {number}; it must be at most {MOST}")
        for name, (pattern, fix) in FORMATS.items():
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise ValueError(f"{name.replace('_', '-')} is {value!r}; give {fix}")
        throttle = (self.array or "").partition("%")[2]
        if throttle and int(throttle) > MOST:
            raise ValueError(f"array is {self.array}; at most {MOST} tasks can run at once")
        for first, last in re.findall(r"(\d+)-(\d+)", self.array or ""):
            if int(first) > int(last):
                raise ValueError(
                    f"array is {self.array!r}; {first}-{last} holds no task, give {last}-{first}"
                )
        if re.search(r":0+(?![0-9])", self.array or ""):
            raise ValueError(f"array is {self.array}, with a step of 0; give 1 or more")
        for argument in self.arguments:
            if re.search(rf"[\0{NOT_UTF_8}]", argument):
                raise ValueError(f"{argument!r} holds a zero byte, or is not UTF-8; rename it")
        if (seconds_of(self.time) or 0) > LONGEST_S:
            raise ValueError(
                f"time is {self.time}, more than the 24855 days that SLURM can count; give less, "
                "or UNLIMITED"
            )
        if self.is_single_task and not self.is_exclusive and self.cluster.cpus_per_task is None:
            raise ValueError(
                "exclusive is false in the table of the cluster, so that all ranks of a cell would "
                "share the one core of a sweep's task; give cpus_per_task there"
            )
        if self.on_gpus:
            self._check_gpus()

    @property
    def is_single_task(self) -> bool:
        """Whether one process of a sweep starts all ranks of a cell, on one node."""
        return self.target == "sweep" and self.nodes == 1

    @property
    def is_unlimited(self) -> bool:
        return self.time is not None and seconds_of(self.time) is None

    @property
    def tasks_per_node(self) -> int:
        return 1 if self.is_single_task else self.devices

    @property
    def gpu_request(self) -> str:
        """How the script itself requests GPUs; none if `extra` of the cluster does."""
        is_own = self.on_gpus and not self.cluster.extra_gpus
        return self.cluster.gpu_request if is_own else "none"

    @property
    def is_exclusive(self) -> bool:
        """Whether the script requests whole nodes."""
        if self.cluster.exclusive is not None:
            return self.cluster.exclusive
        # Otherwise all ranks of a cell would share the core of its one task.
        needs_cores = self.is_single_task and self.cluster.cpus_per_task is None
        # SLURM would give the GPUs of a node to several jobs.
        is_uncounted = self.on_gpus and self.gpu_request == "none" and not self.cluster.extra_gpus
        return needs_cores or is_uncounted

    def _check_gpus(self) -> None:
        """Raises ValueError if a request for GPUs in `extra` disagrees with this job, or the job
        has several devices that are slices of GPUs."""
        units = {
            "--gpus": 1, "--gpus-per-node": self.nodes,
            "--gpus-per-task": self.nodes * self.tasks_per_node,
        }  # fmt: skip
        requests = self.cluster.extra_gpus
        numbers = Counter[str]()  # of all types in one option; each option limits the same GPUs
        for request in requests:
            numbers[request.option] += units[request.unit] * request.number
        for option, number in numbers.items():
            if number == self.nodes * self.devices:
                continue
            of_nodes = "" if self.nodes == 1 else f" on {self.nodes} nodes"
            fix = f"give --devices {number // self.nodes}, or " if number % self.nodes == 0 else ""
            raise ValueError(
                f"devices is {self.devices}{of_nodes}, but {option} in extra of the cluster "
                f"requests {number} GPUs; {fix}leave it out, and say with gpu_request how to ask "
                "for GPUs"
            )
        if self.gpu_type and self.gpu_request == "none":
            raise ValueError(
                f"gpu-type is {self.gpu_type}, but the cluster has "
                + (
                    "a request for GPUs in extra; write the type there"
                    if requests
                    else "gpu_request none; choose nodes with --partition or --constraint"
                )
                + ", and leave gpu-type out"
            )
        for name in (self.gpu_type, *(request.type for request in requests)):
            if name and MIG_SLICE.search(name):
                check_slices(f"gpu-type is {name}", self)


def check_slices(what: str, job: Job) -> None:
    """Raises ValueError if the job has several devices; `what` says that they are MIG slices."""
    if (number := job.nodes * job.devices) > 1:
        raise ValueError(
            f"{what}, a MIG slice of a GPU, and the job has {number} devices: a process sees one "
            "slice only, and slices have no direct link, so that NCCL refuses several of them or "
            "is slow; give --devices 1 on one node, or choose whole GPUs"
        )


def render(job: Job) -> str:
    """Returns the script for `sbatch`. Every value is quoted, whatever it contains."""
    directives = "\n".join(f"#SBATCH {line}" for line in _directives(job))
    settings = "\n".join(_settings(job))
    return f"#!/bin/bash\n{directives}\n\n{_comment(job)}\n{settings}\n\n{_command(job)}"


def _directives(job: Job) -> list[str]:
    cluster, is_single_task = job.cluster, job.is_single_task
    # The batch script of a sweep over nodes passes the signal on: between two cells it has no step.
    of_script = "B:" if job.target == "sweep" and not is_single_task else ""
    cpus = cluster.cpus_per_task
    if cpus is not None and is_single_task:
        cpus *= job.devices  # the one task starts all ranks of a cell
    request, per_node = job.gpu_request, _gpus(job, job.devices)
    per_task = _gpus(job, job.devices // job.tasks_per_node)
    # Of two --gres, sbatch reads only the last.
    gres = [f"gpu:{per_node}"] if request == "gres" else []
    gres += [option[len(GRES) :] for option in cluster.extra if option.startswith(GRES)]
    # sbatch interprets % in file names.
    log_folder = _quote(job.folder.replace("%", "%%"))
    values = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "gpus-per-node": _quote(per_node) if request == "gpus-per-node" else None,
        "gpus-per-task": _quote(per_task) if request == "gpus-per-task" else None,
        "gres": _quote(",".join(gres)) if gres else None,
        "cpus-per-task": cpus,
        "time": "UNLIMITED" if job.is_unlimited else job.time,
        **{name: _quote(value) for name in PASSED_ON if (value := getattr(job, name)) is not None},
        "signal": f"{of_script}{cluster.signal}@{cluster.signal_ahead_s}",
        "open-mode": "append",
        "output": f"{log_folder}/{'%x-%j' if job.array is None else '%x-%A_%a'}.log",
        "chdir": _quote(job.directory),
    }
    lines = [f"--{name}={value}" for name, value in values.items() if value is not None]
    # A site with JobRequeue=0 requeues only the jobs that ask for it.
    lines.append("--requeue" if job.requeue else "--no-requeue")
    if job.is_exclusive and not any(option.startswith(EXCLUSIVE) for option in cluster.extra):
        lines.append(EXCLUSIVE)
    for option in cluster.extra:
        name, _, value = option.partition("=")
        if name != GRES[:-1]:
            lines.append(f"{name}={_quote(value)}" if value else name)
    return lines


def _gpus(job: Job, number: int) -> str:
    return f"{job.gpu_type}:{number}" if job.gpu_type else str(number)


def _quote(value: str) -> str:
    """Returns a value of a directive. sbatch reads quotes as a shell does, but removes
    backslashes between them too."""
    return shlex.quote(value.replace("\\", "\\\\"))


def _comment(job: Job) -> str:
    signal = f"{job.cluster.signal} arrives {job.cluster.signal_ahead_s} s before the time limit:"
    if job.is_unlimited:
        signal = "There is no time limit. If a signal arrives, as in a preemption,"
    if job.target == "sweep":
        return (
            "# Each task runs unfinished cells of the sweep, one after the other.\n"
            f"# {signal} the task releases its cell\n# and is queued again.\n"
        )
    then = "is queued again and resumes from there" if job.requeue else "prints how to continue"
    return f"# {signal} the ranks save after the current\n# step, and the job {then}.\n"


def _settings(job: Job) -> list[str]:
    cluster = job.cluster
    exports = [f"export {name}={_expand(value)}" for name, value in cluster.environment]
    extra_gpus = cluster.extra_gpus if job.on_gpus else []
    requests = {job.gpu_request, *(request.option.removeprefix("--") for request in extra_gpus)}
    if requests & {"gpus-per-task", "tres-per-task"}:
        # A rank needs to see all GPUs of its node, for NCCL and the number of devices. With the
        # last two variables SLURM binds a GPU to each task, since version 23.11 by default.
        variables = "SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_TRES_BIND SLURM_GPU_BIND"
        exports.append(f"unset {variables}")
    if requests & {"gpus-per-task", "tres-per-task", "gres"}:
        # Otherwise a step on whole nodes would have all GPUs.
        exports.append(f"export SLURM_GPUS_PER_NODE={shlex.quote(_gpus(job, job.devices))}")
    if not cluster.modules:
        return ["set -euo pipefail", *exports]
    modules = [f"module load {_expand(module)}" for module in cluster.modules]
    # The function `module` is missing if the job was submitted from a shell without it.
    init = (
        "# shellcheck source=/dev/null\n"
        'type module &>/dev/null || for init in /etc/profile.d/*mod*.sh; do . "$init"; done'
    )
    # Modules may read unset variables.
    return [init, "set -eo pipefail", *modules, "set -u", *exports]


def _expand(text: str) -> str:
    """Returns a word of bash for text of a cluster's table, whose variables the node expands.

    All other text stays literal. A variable that the node lacks ends the job with its name.
    """
    if not VARIABLE.search(text):
        return shlex.quote(text)
    return f'"{IN_QUOTES.sub(_expand_match, text)}"'


def _expand_match(match: re.Match[str]) -> str:
    if name := match["name"] or (match["home"] and "HOME"):
        return f"${{{name}:?not set}}"
    return "~" if match[0] == "\\~" else f"\\{match[0][-1]}"


def _command(job: Job) -> str:
    cluster, local_disk = job.cluster, job.cluster.local_disk
    options = [f"--folder {shlex.quote(job.folder)}"]
    if job.shared is not None:
        options.append(f"--shared {shlex.quote(job.shared)}")
    if local_disk:
        options.append(f"--local-disk {_expand(local_disk)}")
    if cluster.container:
        mounts = [_expand(mount) for mount in cluster.container_mounts]
        paths = [job.directory, job.folder]
        if job.shared is not None:  # the folder of a sweep, which may be elsewhere
            paths.append(os.path.dirname(job.shared))
        mounts += [shlex.quote(f"{path}:{path}") for path in paths]
        mounts += [f"{_expand(local_disk)}:{_expand(local_disk)}"] if local_disk else []
        options += [
            f"--srun=--container-image={_expand(cluster.container)}",
            f"--srun=--container-mounts={','.join(mounts)}",
            f"--srun=--container-workdir={shlex.quote(job.directory)}",
        ]
        if cluster.python:
            options.append(f"--python {_expand(cluster.python)}")  # of the ranks, in the container
    python = _expand(job.python) if job.python == cluster.python else shlex.quote(job.python)
    lines = [
        f"{python} -m slurm.job",
        *options,
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


def seconds_of(time: str | None) -> int | None:
    """Converts a time in one of SLURM's formats (`TIME`); None if it is no limit or not given."""
    if time is None or not time[0].isdigit():
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:  # minutes[:seconds]
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None
