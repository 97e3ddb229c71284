"""Defines the run record, one JSON file per run, and reads and writes it.

A record is a dict that `validate` accepts; its file is named by the hash of its configuration and a
repeat number. Every field has a checksum.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from unitransformer.config import RunConfig, from_dict
from unitransformer.files import write_atomically
from unitransformer.record.checksums import (
    CHECKSUMS,
    add_checksums,
    parse_json,
    to_text,
    verify_checksums,
)
from unitransformer.record.fields import Kinds, check_fields
from unitransformer.record.migration import OLD_SCHEMA, migrate

SCHEMA = 3

Status = Literal[
    "ok", "oom", "oom-inferred", "timeout", "diverged", "crashed", "preempted", "refused"
]
STATUSES: tuple[str, ...] = Status.__args__  # type: ignore[attr-defined]

Record = dict[str, Any]

# Top-level fields that every record has, and their types.
KEYS: dict[str, Kinds] = {
    **dict.fromkeys(("schema", "world_size", "global_batch_size"), int),
    **dict.fromkeys(("status", "recipe", "size", "command", "summary"), str),
    **dict.fromkeys(("config", "code", "versions", "data", "validation"), dict),
    **dict.fromkeys(("samples", "metrics", CHECKSUMS), dict),
    **dict.fromkeys(("loss", "learning_rate", "step_s", "peak_bytes"), list),
    **dict.fromkeys(("hardware", "excluded_steps", "flags", "log"), list),
    "steady_from": (int, NoneType),
    "error": (dict, NoneType),
}

# In `samples`, one value per step, as in `step_s`.
SAMPLES = ("cpu_s", "data_s", "forward_backward_s", "optimizer_s", "slowest_rank")

# The same, with null for a step at which it was not measured. Older records lack them.
OPTIONAL_SAMPLES = ("communication_s", "min_communication_s", "between_steps_s")


def read_record(
    values: Record, where: str = "record", *, checksums_hold: bool = False
) -> tuple[Record, RunConfig]:
    """Returns the record in parsed JSON, with the names of today's schema, and its configuration.

    Args:
        checksums_hold: `parse_json` has verified the checksums.

    Raises:
        ValueError: another schema, a changed field, or anything that `validate` refuses.
    """
    if values.get("schema") not in (OLD_SCHEMA, SCHEMA):
        raise ValueError(
            f"{where}: schema is {values.get('schema')!r}; this version reads {OLD_SCHEMA} and "
            f"{SCHEMA}: measure again, or read it with the version that wrote it"
        )
    if not checksums_hold:
        verify_checksums(values, where)
    record = migrate(values, SCHEMA) if values["schema"] == OLD_SCHEMA else values
    return record, validate(record, where)


def validate(record: Mapping[str, Any], where: str = "record") -> RunConfig:
    """Checks the types of all fields and that they agree; returns the configuration.

    Raises:
        ValueError: the first field that is missing, of another type or contradicts another.
    """
    check_fields(record, KEYS, where)
    check_fields(record, {"samples_missing": dict}, where, missing={})
    if record["schema"] != SCHEMA:
        raise ValueError(f"{where}: schema is {record['schema']}; this version writes {SCHEMA}")
    if record["status"] not in STATUSES:
        raise ValueError(f"{where}: status is {record['status']!r}; known: {', '.join(STATUSES)}")
    config = from_dict(RunConfig, record["config"], f"{where}: config")
    derived = {
        "recipe": config.recipe,
        "size": config.size,
        "world_size": config.parallel.world_size,
        "global_batch_size": config.global_batch_size,
    }
    for key, value in derived.items():
        if record[key] != value:
            raise ValueError(f"{where}: {key} is {record[key]!r}; its config says {value!r}")
    for key in ("loss", "step_s", "learning_rate"):
        _check_numbers(record[key], f"{where}: {key}")
    samples = record["samples"]
    for key in (*SAMPLES, *(name for name in OPTIONAL_SAMPLES if name in samples)):
        if not isinstance(samples.get(key), list):
            raise ValueError(f"{where}: samples.{key} is missing")
        measured = samples[key] if key in SAMPLES else [s for s in samples[key] if s is not None]
        _check_numbers(measured, f"{where}: samples.{key}")
        if len(samples[key]) != len(record["step_s"]):
            raise ValueError(f"{where}: samples.{key} and step_s differ in their number of steps")
    if record["status"] == "ok" and not len(record["loss"]) == len(record["step_s"]) > 0:
        raise ValueError(f"{where}: {len(record['loss'])} losses, {len(record['step_s'])} times")
    return config


def _check_numbers(values: list[Any], where: str) -> None:
    is_number = set(map(type, values)) <= {float, int, bool}
    # The sum is finite if all values are, and is faster; finite values may overflow it.
    if not (is_number and (math.isfinite(sum(values)) or all(map(math.isfinite, values)))):
        raise ValueError(f"{where} holds something that is not a finite number")


def config_of(record: Mapping[str, Any]) -> RunConfig:
    """Returns the configuration with which a record was made."""
    return from_dict(RunConfig, record["config"])


def write_record(record: Record, path: Path) -> Record:
    """Writes a record atomically; returns it with checksums.

    Raises:
        ValueError: the record is not valid.
        OSError: it cannot be written.
    """
    record = add_checksums(record)
    validate(record)
    write_atomically(path, to_text(record, sort_keys=True).encode())
    return record


def load_record(path: Path) -> Record:
    """Returns the record in a file.

    Raises:
        ValueError: not a record that this version reads, with the path and the field.
        OSError: it cannot be read.
    """
    try:
        values, checksums_hold = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a record")
    return read_record(values, str(path), checksums_hold=checksums_hold)[0]
