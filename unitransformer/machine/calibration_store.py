"""Calibrations as files: one JSON each, written whole, kept by the machine's fingerprint.

Figures are recomputed from the samples whenever a file is read, and each field is sealed: an edit
is noticed, and where.
"""

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import platformdirs

from unitransformer.files import write_atomically
from unitransformer.launch.variables import DATA_FOLDER
from unitransformer.machine.alpha_beta import Collective, CollectiveTiming
from unitransformer.machine.calibration import Calibration, Ceiling, WorkSamples
from unitransformer.machine.host import Machine
from unitransformer.record.seals import SEALS, check_seals, read_json, seal

SCHEMA = 1
SCHEMA_FIELD = "calibration_schema"

Kinds = Mapping[str, type | tuple[type, ...]]
NUMBER, LIST, NOTHING = (int, float), (list, tuple), type(None)
HEAD: Kinds = {
    "made_at": str,
    "command": str,
    "device": str,
    "num_ranks": int,
    "left_out": dict,
    "elapsed_s": NUMBER,
}
PARTS: Kinds = {
    "machine": dict,
    "ranks": LIST,
    "collectives": dict,
    "fingerprint": str,
    "figures": dict,
}
MACHINE: Kinds = {
    "cpu": (str, NOTHING),
    "cpu_cores": int,
    "cpu_quota": (*NUMBER, NOTHING),
    "memory_gib": (*NUMBER, NOTHING),
    "system": str,
    "architecture": str,
    "gpus": LIST,
    "software": dict,
}
SAMPLES: Kinds = {"name": str, "work": int, "seconds": LIST}
POINT: Kinds = {"size_bytes": int, "calls": int, "seconds": LIST}
CEILING: Kinds = {
    "device": str,
    "dtype": str,
    "threads": (int, NOTHING),
    "matmul": LIST,
    "copy": dict,
    "elapsed_s": NUMBER,
}
FIGURES: Kinds = {"matmul_flops_per_s": NUMBER, "copy_bytes_per_s": NUMBER}


def to_json(calibration: Calibration) -> dict[str, Any]:
    """Plain values, with figures, seals and the number of the schema."""
    told = asdict(calibration) | {
        "fingerprint": calibration.machine.fingerprint,
        "figures": calibration.metrics(),
    }
    plain: dict[str, Any] = json.loads(json.dumps({SCHEMA_FIELD: SCHEMA, **told}))
    return seal(plain)


def from_json(values: Any, where: str = "calibration") -> Calibration:
    """What `to_json` gave.

    Raises:
        ValueError: another schema, or the first field that is missing, was edited, or is not what
            the samples come to.
    """
    if not isinstance(values, dict) or SCHEMA_FIELD not in values:
        raise ValueError(f"{where}: {SCHEMA_FIELD} is missing; this is no calibration")
    if values[SCHEMA_FIELD] != SCHEMA:
        found = values[SCHEMA_FIELD]
        raise ValueError(f"{where}: {SCHEMA_FIELD} is {found!r}; this version reads {SCHEMA}")
    check_seals(values, where)
    told = {name: value for name, value in values.items() if name not in (SCHEMA_FIELD, SEALS)}
    taken = _take(told, where, {**HEAD, **PARTS})
    calibration = Calibration(
        machine=Machine(**_take(taken["machine"], f"{where}: machine", MACHINE)),
        ranks=tuple(_rank(rank, f"{where}: ranks.{i}") for i, rank in enumerate(taken["ranks"])),
        collectives={
            name: _points(name, points, f"{where}: collectives.{name}")
            for name, points in taken["collectives"].items()
        },
        **{name: taken[name] for name in HEAD},
    )
    again = to_json(calibration)
    for name in ("fingerprint", "figures"):
        if told[name] != again[name]:
            raise ValueError(f"{where}: {name} is {told[name]}; its samples say {again[name]}")
    return calibration


def _rank(values: Any, where: str) -> tuple[Ceiling, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{where} is {values!r}; it must be a list")
    return tuple(_ceiling(one, f"{where}.{index}") for index, one in enumerate(values))


def _points(name: str, values: Any, where: str) -> tuple[CollectiveTiming, ...]:
    if name not in get_args(Collective) or not isinstance(values, list):
        raise ValueError(f"{where} is no list of points of a collective")
    return tuple(CollectiveTiming(**_take(p, f"{where}.{i}", POINT)) for i, p in enumerate(values))


def read_ceiling(values: Mapping[str, Any], where: str = "ceiling") -> Ceiling:
    """What `Ceiling.as_dict` gave.

    Raises:
        ValueError: a field that is missing, of another type, or not what its samples come to.
    """
    taken = _take(values, where, {**CEILING, **FIGURES})
    ceiling = _ceiling({name: taken[name] for name in CEILING}, where)
    for name in FIGURES:
        if taken[name] != getattr(ceiling, name):
            said = getattr(ceiling, name)
            raise ValueError(f"{where}.{name} is {taken[name]}; its samples say {said}")
    return ceiling


def _ceiling(values: Any, where: str) -> Ceiling:
    taken = _take(values, where, CEILING)
    if not taken["matmul"]:
        raise ValueError(f"{where}.matmul is empty")
    products = enumerate(taken.pop("matmul"))
    return Ceiling(
        matmul=tuple(WorkSamples(**_take(p, f"{where}.matmul.{i}", SAMPLES)) for i, p in products),
        copy=WorkSamples(**_take(taken.pop("copy"), f"{where}.copy", SAMPLES)),
        **taken,
    )


def _take(values: Any, where: str, kinds: Kinds) -> dict[str, Any]:
    """These fields and no other, lists as tuples; ValueError for the first that is not so."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; it must be a group of fields")
    for name in (*kinds, *values):
        if name not in values or name not in kinds:
            raise ValueError(f"{where}.{name} is {'missing' if name in kinds else 'not a field'}")
        if not isinstance(values[name], kinds[name]) or isinstance(values[name], bool):
            raise ValueError(f"{where}.{name} is {values[name]!r}")
    return {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}


# ------------------------------------------------------------------------------------ the store


def data_folder() -> Path:
    """Where calibrations are kept: $UNITRANSFORMER_DATA, or the user's folder for data."""
    folder = os.environ.get(DATA_FOLDER)
    root = Path(folder).expanduser() if folder else platformdirs.user_data_path("unitransformer")
    return root / "calibrations"


def default_path(calibration: Calibration) -> Path:
    """A file of its own for machine, date, device and number of ranks."""
    date = datetime.datetime.fromisoformat(calibration.made_at).strftime("%Y%m%dT%H%M%SZ")
    name = f"{date}-{calibration.device}-{calibration.num_ranks}.json"
    return data_folder() / calibration.machine.fingerprint / name


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write it whole or not at all; raises OSError."""
    text = json.dumps(to_json(calibration), indent=1, allow_nan=False)
    write_atomically(path, text.encode())


def read_calibration(path: Path) -> Calibration:
    """Read and check.

    Raises:
        ValueError: not a calibration of this schema, with the path and the field.
        OSError: it cannot be read.
    """
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return from_json(values, str(path))


def load_calibration(
    fingerprint: str, *, device: str | None = None, num_ranks: int | None = None
) -> Calibration | None:
    """The newest that is kept of a machine, of these ranks alone if asked; None if there is none.

    Raises:
        ValueError: the newest is damaged, or of a newer version.
    """
    found = (data_folder() / fingerprint).glob(f"*-{device or '*'}-{num_ranks or '*'}.json")
    newest = max(found, key=lambda path: path.name, default=None)
    return None if newest is None else read_calibration(newest)
