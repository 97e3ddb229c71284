"""What is special about a cluster: a table of a TOML file in, a `Cluster` out."""

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from unitransformer.cli import suggest
from unitransformer.config import from_dict

CLUSTERS = Path(__file__).with_name("clusters.toml")
SIGNALS = ("USR1", "USR2", "TERM")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Defaults of the jobs on a cluster; None leaves it to the cluster itself."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpu_type: str | None = None
    devices: int | None = None  # GPUs of a node, and the ranks on it
    cpus_per_task: int | None = None
    time: str | None = None
    modules: tuple[str, ...] = ()  # loaded before anything starts
    container: str | None = None  # image, for Pyxis
    container_mounts: tuple[str, ...] = ()
    python: str | None = None  # interpreter of the ranks; by default the one that submits
    local_disk: str | None = None  # folder on every node's own disk
    signal: str = "USR1"  # sent ahead of the time limit
    signal_ahead_s: int = 120
    extra: tuple[str, ...] = ()  # any other options of sbatch
    environment: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise ValueError(f"signal is {self.signal}; {suggest(self.signal, SIGNALS)}")
        if not 0 < self.signal_ahead_s <= 65535:
            raise ValueError(
                f"signal_ahead_s is {self.signal_ahead_s}; give seconds, from 1 to 65535"
            )
        for option in self.extra:
            if not re.fullmatch(r"--[a-z][a-z-]*(=[^\n\r]*)?", option):
                raise ValueError(f"extra holds {option!r}; give options of sbatch, as --switches=1")
        for name, _ in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment holds {name!r}; give names of variables")


ANY = Cluster()
KEYS = MappingProxyType({item.name: item.type for item in fields(Cluster)})


def load_cluster(name: str, path: Path = CLUSTERS) -> Cluster:
    """The table called `name`.

    Raises:
        ValueError: no such file or table, an unknown key, a value of another type.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"clusters {path} cannot be read ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"clusters {path} is not TOML: {error}") from error
    if name not in tables:
        cure = suggest(name, list(tables))
        raise ValueError(f"cluster is {name} and {path} has none of that name; {cure}")
    table = tables[name]
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {name} is {table!r}; it must be a table: [{name}]")
    for key in table:
        if key not in KEYS:
            raise ValueError(f"{path}: {name}.{key} is unknown; {suggest(key, list(KEYS))}")
    plain = {key: _plain(value, f"{path}: {name}.{key}") for key, value in table.items()}
    try:
        return from_dict(Cluster, plain, f"{path}: {name}")
    except ValueError as error:
        where = "" if str(error).startswith(str(path)) else f"{path}: {name}."
        raise ValueError(f"{where}{error}") from error


def _plain(value: Any, where: str) -> Any:
    """Lists and tables of TOML as the tuples of a frozen dataclass."""
    if isinstance(value, dict):
        for key, each in value.items():
            if isinstance(each, dict | list):
                raise ValueError(f"{where}.{key} is {each!r}; it must be text or a number")
        return tuple((key, str(each)) for key, each in value.items())
    return tuple(map(str, value)) if isinstance(value, list) else value
