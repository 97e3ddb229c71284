"""The outcome of a sweep cell: one file with checksums per cell and repeat, written at its end.

A cell that ran also has a run record in the same folder. A cell that was refused, killed, or
inferred from another cell has only its outcome.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from unitransformer.config import Recipe, RunConfig, from_dict
from unitransformer.files import write_atomically
from unitransformer.record.checksums import add_checksums, parse_json, to_text, verify_checksums
from unitransformer.record.fields import NUMBER, Kinds, check_fields, is_of_kind
from unitransformer.record.schema import STATUSES, Status

SCHEMA = 1
KIND = "cell"
FILE = "outcome.json"
CELLS = "cells"  # folder of a sweep
STUDY = "study.json"
AXIS = "batch-size"
OUT_OF_MEMORY = ("oom", "oom-inferred")

OPTIONAL_STRINGS = (
    *("reason", "started_at", "finished_at", "record", "inferred_from", "checks", "slurm_job"),
)
FIELDS: dict[str, Kinds] = {
    **dict.fromkeys(("kind", "cell", "recipe", "command", "status"), str),
    **dict.fromkeys(OPTIONAL_STRINGS, (str, NoneType)),
    **dict.fromkeys(("schema", "repeat"), int),
    **dict.fromkeys(("exit_code", "memory_limit_bytes"), (int, NoneType)),
    **dict.fromkeys(("config", "host"), (dict, NoneType)),
    "options": dict,
    "elapsed_s": NUMBER,
    "last_lines": list,
}
ADDED_FIELDS = {"host": None, "checks": None, "slurm_job": None}  # older outcomes lack them


@dataclass(frozen=True, kw_only=True)
class CellOutcome:
    """How one repeat of a cell ended."""

    cell: str  # 12 hexadecimal digits over recipe and options
    repeat: int  # from 1
    recipe: Recipe
    options: Mapping[str, Any]  # of the recipe that the axes set, by name without dashes
    command: str  # that runs the cell again
    status: Status
    reason: str | None = None  # one line; None: ok
    exit_code: int | None = None  # None: killed at a limit, or never started
    elapsed_s: float = 0.0
    started_at: str | None = None  # None: never started
    finished_at: str | None = None
    last_lines: tuple[str, ...] = ()  # of the log, unless the status is ok
    record: str | None = None  # name of the run record in the same folder
    inferred_from: str | None = None  # the cell that ran out of memory, so that this one would too
    memory_limit_bytes: int | None = None  # of the whole cell; None: the machine's
    config: RunConfig | None = None  # None: the recipe refused the options
    # Kind and memory of the machine and its GPUs, for which an out-of-memory status holds.
    host: Mapping[str, Any] | None = None  # None: not recorded
    checks: str | None = None  # the out-of-memory cell whose inference this cell ran to check
    slurm_job: str | None = None  # SLURM_JOB_ID of its process; None: not under SLURM

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.cell}-{self.repeat}"


def write_outcome(outcome: CellOutcome, folder: Path) -> Path:
    """Writes it atomically into the folder of its cell; raises OSError."""
    path = folder / FILE
    content = {"schema": SCHEMA, "kind": KIND, **asdict(outcome)}
    write_atomically(path, to_text(add_checksums(content)).encode())
    return path


def load_outcome(path: Path) -> CellOutcome:
    """Raises ValueError for a file that is not an unchanged outcome, OSError if unreadable."""
    values, checksums_hold = parse_json(path.read_bytes())
    if not is_outcome(values):
        raise ValueError("not the outcome of a cell")
    return read_outcome(values, checksums_hold=checksums_hold)


def is_outcome(values: Any) -> bool:
    return isinstance(values, Mapping) and values.get("kind") == KIND


def read_outcome(
    values: Mapping[str, Any], where: str = "outcome", *, checksums_hold: bool = False
) -> CellOutcome:
    """Returns the outcome; `checksums_hold`: `parse_json` has verified the checksums.

    Raises:
        ValueError: names the first field that is missing, changed or of another type.
    """
    if values.get("schema") != SCHEMA:
        raise ValueError(
            f"{where}: schema is {values.get('schema')!r}; this version reads {SCHEMA}: run the "
            "sweep again, or read it with the version that wrote it"
        )
    if not checksums_hold:
        verify_checksums(values, where)
    values = {**ADDED_FIELDS, **values}
    check_fields(values, FIELDS, where)
    recipes = get_args(Recipe)
    if values["recipe"] not in recipes:
        raise ValueError(f"{where}: recipe is {values['recipe']!r}; known: {', '.join(recipes)}")
    for name, value in values["options"].items():
        if not is_of_kind(value, (str, bool, *NUMBER)):
            raise ValueError(f"{where}: options.{name} is {value!r}; it must be text or a number")
    if values["status"] not in STATUSES:
        raise ValueError(f"{where}: status is {values['status']!r}; known: {', '.join(STATUSES)}")
    config = values["config"]
    return CellOutcome(
        **{name: values[name] for name in FIELDS if name not in ("schema", "kind", "config")}
        | {
            "last_lines": tuple(map(str, values["last_lines"])),
            "config": None if config is None else from_dict(RunConfig, config, f"{where}: config"),
        }
    )
