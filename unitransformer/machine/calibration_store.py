"""Stores calibrations as JSON files, in a folder per machine fingerprint.

Each field of a file has a checksum, and reading computes the metrics again from the samples, so an
edit is noticed and its field named.
"""

import datetime
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs

from unitransformer.files import folder_of, write_atomically
from unitransformer.launch.variables import DATA_FOLDER
from unitransformer.machine.calibration import Calibration, Ceiling
from unitransformer.record.checksums import CHECKSUMS, add_checksums, read_json, verify_checksums
from unitransformer.record.migration import OLD_CHECKSUMS

SCHEMA = 1
SCHEMA_FIELD = "calibration_schema"
DERIVED = ("fingerprint", "figures")
CEILING_DERIVED = ("matmul_flops_per_s", "copy_bytes_per_s")


def to_json(calibration: Calibration) -> dict[str, Any]:
    """Returns plain values with metrics, checksums and the number of the schema."""
    values = asdict(calibration) | {
        "fingerprint": calibration.machine.fingerprint,
        "figures": calibration.metrics(),
    }
    plain: dict[str, Any] = json.loads(json.dumps({SCHEMA_FIELD: SCHEMA, **values}))
    return add_checksums(plain)


def from_json(values: Any, where: str = "calibration") -> Calibration:
    """Returns the calibration that `to_json` stored.

    Raises ValueError for another schema, and for the first field that is missing, was edited, or
    contradicts the samples.
    """
    if not isinstance(values, dict) or SCHEMA_FIELD not in values:
        raise ValueError(f"{where}: {SCHEMA_FIELD} is missing; this is not a calibration")
    schema = values[SCHEMA_FIELD]
    if schema != SCHEMA:
        raise ValueError(f"{where}: {SCHEMA_FIELD} is {schema!r}; this version reads {SCHEMA}")
    verify_checksums(values, where)
    others = (SCHEMA_FIELD, CHECKSUMS, OLD_CHECKSUMS, *DERIVED)
    calibration: Calibration = _build(Calibration, values, where, without=others)
    again = to_json(calibration)
    _check_derived(values, {name: again[name] for name in DERIVED}, where)
    return calibration


def read_ceiling(values: Mapping[str, Any], where: str = "ceiling") -> Ceiling:
    """Returns the ceiling that `Ceiling.as_dict` stored.

    Raises ValueError for a field that is missing, of another type, or contradicts its samples.
    """
    ceiling: Ceiling = _build(Ceiling, values, where, without=CEILING_DERIVED)
    _check_derived(values, {name: getattr(ceiling, name) for name in CEILING_DERIVED}, where)
    return ceiling


def _check_derived(values: Mapping[str, Any], derived: Mapping[str, Any], where: str) -> None:
    for name, value in derived.items():
        if values.get(name) != value:
            raise ValueError(f"{where}.{name} is {values.get(name)}; its samples give {value}")


def _build(hint: Any, value: Any, where: str, *, without: Sequence[str] = ()) -> Any:
    """Returns `value`, parsed from JSON, as type `hint`: a dataclass, container or plain type.

    Leaves out the fields `without`. Raises ValueError for the first other field that is missing,
    unknown or of another type.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        names = [field.name for field in fields(hint)]
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}; it must be a group of fields")
        value = {name: item for name, item in value.items() if name not in without}
        for name in (*names, *value):
            if name not in value or name not in names:
                problem = "missing" if name in names else "not a field"
                raise ValueError(f"{where}.{name} is {problem}")
        hints = typing.get_type_hints(hint)
        return hint(**{n: _build(hints[n], value[n], f"{where}.{n}") for n in names})
    if origin in (tuple, Sequence) and isinstance(value, list):
        return tuple(_build(parts[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {
            _build(parts[0], name, where): _build(parts[1], item, f"{where}.{name}")
            for name, item in value.items()
        }
    kinds = parts or (hint,)
    kinds = (*kinds, int) if float in kinds else kinds
    fits = value in kinds if origin is Literal else type(value) in kinds
    if not fits:
        raise ValueError(f"{where} is {value!r}; it must be {hint}")
    return value


def data_folder() -> Path:
    """Returns the folder of calibrations: $UNITRANSFORMER_DATA, or the user's data folder."""
    root = folder_of(DATA_FOLDER) or platformdirs.user_data_path("unitransformer")
    return root / "calibrations"


def default_path(calibration: Calibration) -> Path:
    """Returns a path made of fingerprint, date, device and number of ranks."""
    date = datetime.datetime.fromisoformat(calibration.made_at).strftime("%Y%m%dT%H%M%SZ")
    name = f"{date}-{calibration.device}-{calibration.num_ranks}.json"
    return data_folder() / calibration.machine.fingerprint / name


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Writes a file atomically; raises OSError."""
    write_atomically(path, json.dumps(to_json(calibration), indent=1, allow_nan=False).encode())


def read_calibration(path: Path) -> Calibration:
    """Reads a file; raises OSError, and ValueError with path and field as `from_json` does."""
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return from_json(values, str(path))


def load_calibration(
    fingerprint: str, *, device: str | None = None, num_ranks: int | None = None
) -> Calibration | None:
    """Returns the newest stored calibration of a machine, device and number of ranks, or None.

    Raises ValueError if the newest is damaged, or of a newer version.
    """
    paths = (data_folder() / fingerprint).glob(f"*-{device or '*'}-{num_ranks or '*'}.json")
    newest = max(paths, key=lambda path: path.name, default=None)
    return None if newest is None else read_calibration(newest)
