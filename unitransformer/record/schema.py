"""The run record: one JSON file a run, written whole or not at all.

Plain in, plain out: a dict that `validate` accepts. The folder is the store; a file is named by
the hash of its configuration and a repeat number. Every field carries a seal: what is changed
after it was written is noticed, to the digit.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from unitransformer.config import RunConfig, from_dict
from unitransformer.files import write_atomically
from unitransformer.record.seals import check_seals, read_sealed, seal, to_text

SCHEMA = 2

Status = Literal["ok", "oom", "oom-inferred", "timeout", "crashed", "preempted", "refused"]

STATUSES: tuple[str, ...] = Status.__args__  # type: ignore[attr-defined]

Record = dict[str, Any]

# Top-level keys that people and tools rely on, and their types.
KEYS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "status": str,
    "recipe": str,
    "size": str,
    "config": dict,
    "world_size": int,
    "global_batch_size": int,
    "command": str,
    "code": dict,
    "versions": dict,
    "hardware": list,
    "data": dict,
    "loss": list,
    "learning_rate": list,
    "step_s": list,
    "samples": dict,
    "unsteady": list,
    "steady_from": (int, type(None)),
    "figures": dict,
    "flags": list,
    "peak_bytes": list,
    "validation": dict,
    "summary": str,
    "log": list,
    "error": (dict, type(None)),
}

# Raw seconds beside `step_s`, one a step.
SAMPLES = ("cpu_s", "data_s", "forward_backward_s", "optimizer_s", "slowest_rank")

# The same where they are told: null is a step of which they are not. Older records lack them.
OPTIONAL_SAMPLES = ("communication_s", "least_communication_s", "between_s")


def validate(
    record: Mapping[str, Any], where: str = "record", *, seals_hold: bool = False
) -> RunConfig:
    """Check that `record` has this schema and agrees with itself; returns its configuration.

    Args:
        seals_hold: `read_sealed` has found so.

    Raises:
        ValueError: the first field that is missing, of another type or contradicts another.
    """
    if record.get("schema") != SCHEMA:
        raise ValueError(
            f"{where}: schema is {record.get('schema')!r}; this version reads {SCHEMA}: "
            "measure again, or read it with the version that wrote it"
        )
    if not seals_hold:
        check_seals(record, where)
    for key, kind in KEYS.items():
        if key not in record:
            raise ValueError(f"{where}: {key} is missing")
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            raise ValueError(f"{where}: {key} is {type(record[key]).__name__}")
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
    if not isinstance(record.get("samples_untold", {}), dict):
        raise ValueError(f"{where}: samples_untold is {type(record['samples_untold']).__name__}")
    for key in ("loss", "step_s", "learning_rate"):
        _check_numbers(record[key], f"{where}: {key}")
    samples = record["samples"]
    for key in (*SAMPLES, *(name for name in OPTIONAL_SAMPLES if name in samples)):
        if not isinstance(samples.get(key), list):
            raise ValueError(f"{where}: samples.{key} is missing")
        told = samples[key] if key in SAMPLES else [s for s in samples[key] if s is not None]
        _check_numbers(told, f"{where}: samples.{key}")
        if len(samples[key]) != len(record["step_s"]):
            raise ValueError(f"{where}: samples.{key} and step_s differ in their number of steps")
    if record["status"] == "ok" and not len(record["loss"]) == len(record["step_s"]) > 0:
        raise ValueError(f"{where}: {len(record['loss'])} losses, {len(record['step_s'])} times")
    return config


def _check_numbers(values: list[Any], where: str) -> None:
    is_number = set(map(type, values)) <= {float, int, bool}
    # A sum is finite if all are, and found sooner; it may overflow where none is infinite.
    if not (is_number and (math.isfinite(sum(values)) or all(map(math.isfinite, values)))):
        raise ValueError(f"{where} holds something that is not a finite number")


def config_of(record: Mapping[str, Any]) -> RunConfig:
    """The configuration a record was made with."""
    return from_dict(RunConfig, record["config"])


def write_record(record: Record, path: Path) -> Record:
    """Seal, validate and write; returns it as it is written.

    Raises:
        ValueError: the record is not valid.
        OSError: it cannot be written.
    """
    sealed = seal(record)
    validate(sealed)
    write_atomically(path, to_text(sealed, sort_keys=True).encode())
    return sealed


def load_record(path: Path) -> Record:
    """Read and validate.

    Raises:
        ValueError: not a record of this schema, with the path and the field.
        OSError: it cannot be read.
    """
    try:
        record, seals_hold = read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a record")
    validate(record, str(path), seals_hold=seals_hold)
    return record
