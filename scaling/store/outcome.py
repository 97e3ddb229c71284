"""What became of a cell of a sweep: one sealed file a cell and repeat, written when it has ended.

A cell that ran has a run record beside its outcome; one that was refused, killed or settled by
another cell has only this.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from unitransformer.config import Recipe, RunConfig, from_dict
from unitransformer.files import write_atomically
from unitransformer.record.fields import NUMBER, Kinds, check_fields
from unitransformer.record.schema import STATUSES, Status
from unitransformer.record.checksums import (
    add_checksums,
    parse_json,
    to_text,
    verify_checksums,
)

SCHEMA = 1

KIND = "cell"

FILE = "outcome.json"

FIELDS: dict[str, Kinds] = {
    "schema": int,
    "kind": str,
    "cell": str,
    "repeat": int,
    "recipe": str,
    "options": dict,
    "command": str,
    "status": str,
    "reason": (str, NoneType),
    "exit_code": (int, NoneType),
    "elapsed_s": NUMBER,
    "started_at": (str, NoneType),
    "finished_at": (str, NoneType),
    "last_lines": list,
    "record": (str, NoneType),
    "inferred_from": (str, NoneType),
    "memory_limit_bytes": (int, NoneType),
    "config": (dict, NoneType),
    "host": (dict, NoneType),
    "checks": (str, NoneType),
}

LATER = {"host": None, "checks": None}  # fields that older outcomes do not have


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one cell ended, once."""

    cell: str  # 12 hexadecimal digits over recipe and options
    repeat: int  # from 1
    recipe: Recipe
    options: Mapping[str, Any]  # of the recipe, by name without dashes: what the axes say
    command: str  # what a person types to run it again
    status: Status
    reason: str | None = None  # in one line; None: ok
    exit_code: int | None = None  # None: killed for its time or memory, or never started
    elapsed_s: float = 0.0
    started_at: str | None = None  # None: never started
    finished_at: str | None = None
    last_lines: tuple[str, ...] = ()  # of its log, if it did not end well
    record: str | None = None  # name of the run record beside this file
    inferred_from: str | None = None  # the cell whose lack of memory settles this one
    memory_limit_bytes: int | None = None  # of the whole cell; None: the machine's
    config: RunConfig | None = None  # None: the recipe refused the options
    # Kind and memory of the machine and its GPUs, which a lack of memory is a lack of.
    host: Mapping[str, Any] | None = None  # None: not told
    checks: str | None = None  # the cell whose lack of memory settles this one, which ran to see

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.cell}-{self.repeat}"


def write_outcome(outcome: Outcome, folder: Path) -> Path:
    """Put it into its cell's folder, whole or not at all; raises OSError."""
    content = {"schema": SCHEMA, "kind": KIND, **asdict(outcome)}
    path = folder / FILE
    write_atomically(path, to_text(add_checksums(content)).encode())
    return path


def load_outcome(path: Path) -> Outcome:
    """Raises ValueError for anything that is not an outcome as it was written; OSError."""
    values, checksums_hold = parse_json(path.read_bytes())
    if not is_outcome(values):
        raise ValueError("not the outcome of a cell")
    return read_outcome(values, checksums_hold=checksums_hold)


def is_outcome(values: Any) -> bool:
    return isinstance(values, Mapping) and values.get("kind") == KIND


def read_outcome(
    values: Mapping[str, Any], where: str = "outcome", *, checksums_hold: bool = False
) -> Outcome:
    """Raises ValueError for the first field that is missing, changed or of another kind.

    Args:
        checksums_hold: `parse_json` has verified the checksums.
    """
    if values.get("schema") != SCHEMA:
        raise ValueError(
            f"{where}: schema is {values.get('schema')!r}; this version reads {SCHEMA}: run the "
            "sweep again, or read it with the version that wrote it"
        )
    if not checksums_hold:
        verify_checksums(values, where)
    values = {**LATER, **values}
    check_fields(values, FIELDS, where)
    if values["status"] not in STATUSES:
        raise ValueError(f"{where}: status is {values['status']!r}; known: {', '.join(STATUSES)}")
    config = values["config"]
    return Outcome(
        **{name: values[name] for name in FIELDS if name not in ("schema", "kind", "config")}
        | {
            "last_lines": tuple(map(str, values["last_lines"])),
            "config": None if config is None else from_dict(RunConfig, config, f"{where}: config"),
        }
    )


CELLS = "cells"

AXIS = "batch-size"

LACKS_MEMORY = ("oom", "oom-inferred")

STUDY = "study.json"
