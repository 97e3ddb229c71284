"""The store: folders go in; run records and certificates come out, and the files that are neither.

A record that cannot be relied on is left out with its reason and never stops the others. Names of
files are relative to a folder the caller gives, so that what is made of them can be moved.
"""

import functools
import hashlib
import json
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from scaling.parity.certificate import Certificate
from scaling.parity.certificate_file import is_certificate, read_certificate
from scaling.store.outcome import Outcome, is_outcome, read_outcome
from scaling.store.required_fields import check_facts
from scaling.store.run import Run
from unitransformer.checkpoint.names import is_checkpoint_name
from unitransformer.launch.gc_pause import pause_gc
from unitransformer.record.schema import read_record
from unitransformer.record.checksums import CHECKSUMS, parse_json


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a sweep, once: what became of it, and its run if it left a record."""

    name: str  # of the file of the outcome
    outcome: Outcome
    run: Run | None

    @functools.cached_property
    def sweep(self) -> str:
        """Folder of the sweep it belongs to."""
        return str(PurePosixPath(self.name).parent.parent.parent)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file that is not used. Damaged: meant to be a record. Foreign: something else."""

    name: str
    kind: Literal["damaged", "foreign", "duplicate"]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Store:
    """What was found, in the order of the names."""

    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]
    certificates: tuple[Certificate, ...] = ()
    cells: tuple[Cell, ...] = ()

    @functools.cached_property
    def single_runs(self) -> tuple[Run, ...]:
        """Runs that are no cell of a sweep."""
        of_cells = {cell.run.name for cell in self.cells if cell.run is not None}
        return tuple(run for run in self.runs if run.name not in of_cells)


_Read = Run | Certificate | Outcome | LeftOut


def load_store(folders: Sequence[Path], *, relative_to: Path) -> Store:
    """Read every `*.json` below `folders`, what is hidden and checkpoints aside.

    Args:
        relative_to: folder from which the names lead to the files.

    Raises:
        ValueError: a folder that does not exist or is a file.
    """
    closed: list[OSError] = []
    found = dict(_find_files(folders, relative_to, closed))
    names: dict[Hashable, str] = {}  # of the first file with a content
    runs: list[Run] = []
    certificates: list[Certificate] = []
    outcomes: dict[str, Outcome] = {}
    left_out = [_closed_folder(error, relative_to) for error in closed]
    with pause_gc():
        contents = [(name, _read(found[name], name)) for name in sorted(found)]
    for name, read in contents:
        if isinstance(read, LeftOut):
            left_out.append(read)
            continue
        if isinstance(read, Outcome):
            first = names.setdefault(repr(read), name)
            if first == name:
                outcomes[name] = read
            else:
                left_out.append(LeftOut(name=name, kind="duplicate", reason=f"the same as {first}"))
            continue
        first = names.setdefault(_identity(read), name)
        if first == name:
            certificates.append(read) if isinstance(read, Certificate) else runs.append(read)
        else:
            left_out.append(LeftOut(name=name, kind="duplicate", reason=f"the same as {first}"))
    runs, under_way = _without_outcome(runs, outcomes)
    left_out += under_way
    left_out.sort(key=lambda file: file.name)
    return Store(
        runs=tuple(runs),
        left_out=tuple(left_out),
        certificates=tuple(certificates),
        cells=tuple(_cells(outcomes, runs)),
    )


def _cells(outcomes: Mapping[str, Outcome], runs: Sequence[Run]) -> Iterator[Cell]:
    by_name = {run.name: run for run in runs}
    for name, outcome in outcomes.items():
        record = None
        if outcome.record is not None:
            record = by_name.get(PurePosixPath(name).with_name(outcome.record).as_posix())
        yield Cell(name=name, outcome=outcome, run=record)


def _without_outcome(
    runs: Sequence[Run], outcomes: Mapping[str, Outcome]
) -> tuple[list[Run], list[LeftOut]]:
    """Records of cells that are under way, or were when their sweep was killed, are left out: they
    are no runs of their own."""
    sweeps = {str(PurePosixPath(name).parent.parent) for name in outcomes}
    cells = {str(PurePosixPath(name).parent) for name in outcomes}
    kept, left = [], []
    for run in runs:
        place = PurePosixPath(run.name).parent
        if place.parent.name == "cells" and str(place.parent) in sweeps and str(place) not in cells:
            reason = "of a cell without an outcome: it is under way, or its sweep was stopped"
            left.append(LeftOut(name=run.name, kind="foreign", reason=reason))
        else:
            kept.append(run)
    return kept, left


def relative_name(path: Path, folder: Path) -> str:
    """How to reach `path` from `folder`, links resolved, with slashes on every system."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


# ---------------------------------------------------------------------------------- files


def _find_files(
    folders: Sequence[Path], relative_to: Path, closed: list[OSError]
) -> Iterator[tuple[str, Path]]:
    """Every candidate by its name; folders that cannot be listed are added to `closed`."""
    for folder in folders:
        if not folder.exists():
            raise ValueError(f"{folder} does not exist; give a folder that holds run records")
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file; give the folder it is in")
        for place, inner, files in os.walk(folder, onerror=closed.append):
            inner[:] = [n for n in inner if not (n.startswith(".") or is_checkpoint_name(n))]
            found = [name for name in files if name.endswith(".json") and not name.startswith(".")]
            if not found:
                continue
            way = relative_name(Path(place), relative_to)  # once, not for each of thousands
            for name in found:
                path = Path(place, name)
                if path.is_symlink():
                    yield relative_name(path, relative_to), path
                else:
                    yield name if way == "." else f"{way}/{name}", path


def _closed_folder(error: OSError, relative_to: Path) -> LeftOut:
    name = relative_name(Path(error.filename), relative_to)
    return LeftOut(name=name, kind="damaged", reason=f"cannot be read: {error.strerror}")


def _read(path: Path, name: str) -> _Read:
    try:
        content = path.read_bytes()
    except OSError as error:
        return LeftOut(name=name, kind="damaged", reason=f"cannot be read: {error.strerror}")
    return _parse(content, name)


def _parse(content: bytes, name: str) -> _Read:
    try:
        record, checksums_hold = parse_json(content)
    except ValueError as error:
        return LeftOut(name=name, kind="damaged", reason=str(error))
    is_ours = isinstance(record, dict) and record.keys() & {"schema", "step_s"}
    if not is_ours or record.get("kind") == "study":
        return LeftOut(name=name, kind="foreign", reason="not a run record")
    try:
        if is_outcome(record):
            return read_outcome(record, checksums_hold=checksums_hold)
        if is_certificate(record):
            return read_certificate(record, name)
        record, config = read_record(record, checksums_hold=checksums_hold)
        if record["status"] == "ok":
            check_facts(record)
        run = Run(name=name, record=record, config=config)
        if run.is_ok:
            _ = run.mfu  # its rows contradict nothing
    except (ValueError, OverflowError) as error:
        return LeftOut(name=name, kind="damaged", reason=str(error))
    return run


def _identity(read: Run | Certificate) -> Hashable:
    """Equal for equal contents. The checksums of a record stand for all of it: they hold."""
    if isinstance(read, Run):
        return frozenset(read.record[CHECKSUMS].items())
    return hashlib.sha256(json.dumps(read.content, sort_keys=True).encode()).hexdigest()
