"""Reads the settings of a cluster from a TOML file."""

import datetime
import re
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unitransformer.cli import read_integer, suggest
from unitransformer.config import from_dict

CLUSTERS = Path(__file__).with_name("clusters.toml")
SIGNALS = ("USR1", "USR2", "TERM")
DIRECTIVES = ("partition", "account", "qos", "constraint", "gpu_type")  # options of sbatch
# Characters for sets of a pattern. Python reads bytes that are not UTF-8 as surrogates.
NOT_UTF_8 = r"\ud800-\udfff"
CONTROL = rf"\0-\x1f\x7f-\x9f{NOT_UTF_8}"
# The batch script expands $NAME, ${NAME} and a ~ that begins a path, without a backslash before it.
VARIABLE = re.compile(
    r"\\[$~`]|\$(?P<brace>\{)?(?P<name>[A-Za-z_]\w*)(?(brace)\})|(?:^|(?<=:))(?P<home>~)(?=[/:]|\Z)",
    re.ASCII,
)
# Bash would expand these too, but the script does not.
UNREADABLE = re.compile(r"(?<!\\)(\$(?![A-Za-z_]|\{[A-Za-z_]\w*\})[({]?|`)", re.ASCII)
# One value for all nodes cannot contain these; the home of another user may be anywhere.
NOT_EXPANDED = re.compile(
    r"(?:^|(?<=:))~\w[^/:]*"
    r"|(?<!\\)\$\{?(HOSTNAME|SLURMD_NODENAME|SLURM_(NODE|PROC|LOCAL)ID|(LOCAL_)?RANK)\b"
)

GPU_OPTIONS = ("--gpus", "--gpus-per-node", "--gpus-per-task")
INDIRECT_GPUS = re.compile("--(gpus-per-socket|ntasks-per-gpu)")
GRES_OPTIONS = {"--gres": "--gpus-per-node", "--tres-per-task": "--gpus-per-task"}


class GpuRequest(NamedTuple):
    """One of the requests for GPUs in `extra`, of one type."""

    option: str  # of GPU_OPTIONS or GRES_OPTIONS
    unit: str  # of GPU_OPTIONS
    type: str | None
    number: int


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Defaults for the jobs on a cluster. None leaves a setting to SLURM."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_request: Literal["gpus-per-node", "gpus-per-task", "gres", "none"] = "gpus-per-node"
    gpu_type: str | None = None
    devices: int | None = None  # GPUs per node, and ranks per node
    cpus_per_task: int | None = None
    exclusive: bool | None = None  # request whole nodes; default: where a job needs them
    time: str | None = None
    max_array_tasks: int | None = None  # of a sweep for each number of nodes; 0 for no array
    modules: tuple[str, ...] = ()  # loaded first
    container: str | None = None  # image for Pyxis
    container_mounts: tuple[str, ...] = ()
    python: str | None = None  # interpreter of the ranks; default: the one that submits
    local_disk: str | None = None  # folder on a disk of each node
    signal: str = "USR1"  # sent before the time limit
    signal_ahead_s: int = 120
    extra: tuple[str, ...] = ()  # further options of sbatch
    environment: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise ValueError(f"signal is {self.signal}; {suggest(self.signal, SIGNALS)}")
        if not 0 < self.signal_ahead_s <= 65535:
            raise ValueError(
                f"signal_ahead_s is {self.signal_ahead_s}; give seconds, from 1 to 65535"
            )
        if (tasks := self.max_array_tasks) is not None and tasks < 0:
            raise ValueError(f"max_array_tasks is {tasks}; give a number, or 0 for no arrays")
        for option in self.extra:
            if not re.fullmatch(rf"--[a-z][a-z-]*(=[^{CONTROL}]*)?", option):
                raise ValueError(f"extra holds {option!r}; give options of sbatch: --switches=1")
            if INDIRECT_GPUS.match(option):
                raise ValueError(
                    f"extra holds {option!r}, which does not say how many GPUs a node has in the "
                    "job; give --gpus-per-node or gpu_request instead"
                )
        for name, _ in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment holds {name!r}; give names of variables")
        directives = [(name, getattr(self, name) or "") for name in DIRECTIVES]
        directives += [("extra", option.partition("=")[2]) for option in self.extra]
        _refuse(VARIABLE, directives, "sbatch expands nothing here; write the value")
        names = ("python", "local_disk", "container")
        expanded = [(name, getattr(self, name) or "") for name in names]
        expanded += [("container_mounts", mount) for mount in self.container_mounts]
        expanded += [(f"environment.{name}", text) for name, text in self.environment]
        _refuse(NOT_EXPANDED, expanded, "write a path that all nodes share")
        expanded += [("modules", module) for module in self.modules]
        _refuse(UNREADABLE, expanded, r"only $NAME and ${NAME} are read; a literal one is \$ or \`")

    @property
    def extra_gpus(self) -> list[GpuRequest]:
        """The requests for GPUs in `extra`."""
        requests = []
        for option in self.extra:
            name, _, value = option.partition("=")
            for item in re.sub(r"\(.*?\)", "", value).split(","):
                gpu = re.fullmatch(r"(?:gres[:/])?gpu(?:[:=](.*))?", item)
                if name in GRES_OPTIONS and gpu:
                    item = gpu[1] or ""
                elif name not in GPU_OPTIONS:
                    continue
                head, _, number = item.rpartition(":")
                kind, count = (head, int(number)) if number.isdecimal() else (item, 1)
                unit = GRES_OPTIONS.get(name, name)
                requests.append(GpuRequest(name, unit, kind or None, count))
        return requests


def _refuse(pattern: re.Pattern[str], texts: Sequence[tuple[str, str]], fix: str) -> None:
    for name, text in texts:
        if match := pattern.search(text):
            raise ValueError(f"{name} is {text!r}, which holds {match[0]}; {fix}")


NO_CLUSTER = Cluster()


def load_cluster(name: str, path: Path = CLUSTERS) -> Cluster:
    """Returns the cluster in the table `name` of a TOML file.

    Raises ValueError if the file or the table is missing, or a key or value is invalid.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        tables = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"clusters {path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # not TOML, or not UTF-8
        fix = 'write UTF-8, and text in quotes: time = "1-12:00:00"'
        raise ValueError(f"clusters {path} is not TOML: {error}; {fix}") from error
    if name not in tables:
        hint = suggest(name, list(tables))
        raise ValueError(f"cluster is {name}, and {path} has no table of that name; {hint}")
    table = tables[name]
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {name} is {table!r}; it must be a table: [{name}]")
    known = [field.name for field in fields(Cluster)]
    for key in table:
        if key not in known:
            raise ValueError(f"{path}: {name}.{key} is unknown; {suggest(key, known)}")
    hints = typing.get_type_hints(Cluster)
    values = {
        key: _read(hints[key], value, f"{path}: {name}.{key}", text) for key, value in table.items()
    }
    try:
        return from_dict(Cluster, values, f"{path}: {name}")
    except ValueError as error:
        where = "" if str(error).startswith(str(path)) else f"{path}: {name}."
        raise ValueError(f"{where}{error}") from error


def _read(kind: Any, value: Any, where: str, source: str) -> Any:
    """Reads a value of TOML as an option is read; lists and tables become tuples of text.

    `source` is the whole file: a number counts as text if it is written like this in there.
    """
    if kind in (int, int | None):
        try:
            return read_integer(value)
        except ValueError as error:
            raise ValueError(f"{where} is {error}") from None
    if kind in (str, str | None):
        if isinstance(value, datetime.time) and not value.microsecond:  # such as 02:00:00
            return value.isoformat()
        # TOML does not keep how a name such as 1e3 or 0x1f was written.
        is_written = type(value) is int and re.search(rf"(?<![\w.+-]){value}(?![\w.])", source)
        if type(value) is not str and not is_written:
            raise ValueError(f"{where} is {value}; it must be text: write it in quotes")
        if "\0" in str(value):
            raise ValueError(f"{where} is {value!r}, with a zero byte; leave it out")
        return str(value)
    is_table = kind == tuple[tuple[str, str], ...]
    if is_table and isinstance(value, dict):
        pairs = value.items()
        return tuple((name, _read(str, item, f"{where}.{name}", source)) for name, item in pairs)
    if is_table:
        raise ValueError(f'{where} is {value!r}; it must be a table: {{ NAME = "value" }}')
    if isinstance(value, list):
        return tuple(_read(str, item, where, source) for item in value)
    return value
