"""The store: folders go in; run records and certificates come out, and the files that are neither.

A record that cannot be relied on is left out with its reason and never stops the others. Names of
files are relative to a folder the caller gives, so that what is made of them can be moved.
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import orjson

from scaling.parity.certificate import Certificate
from scaling.parity.certificate_file import is_certificate, read_certificate
from scaling.store.metrics_cache import Kept, open_kept
from scaling.store.outcome import Outcome, is_outcome, read_outcome
from scaling.store.required_fields import check_facts
from scaling.store.run import Run, find
from unitransformer.checkpoint.names import is_checkpoint_name
from unitransformer.launch.gc_pause import pause_gc
from unitransformer.record.schema import config_of, validate
from unitransformer.record.seals import SEALS, parse_sealed

FILES_OF_A_PROCESS = 500  # fewer are read before another process has started
CHUNK = 50  # files that go to a process at once


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


def load_store(
    folders: Sequence[Path],
    *,
    relative_to: Path,
    processes: int = 1,
    kept: Kept | None = None,
) -> Store:
    """Read every `*.json` below `folders`, what is hidden and checkpoints aside.

    Args:
        relative_to: folder from which the names lead to the files.
        kept: what was found in the same records before, and is not found again.
        processes: at most so many read beside each other, where there are thousands of files.
            They find the figures of the runs as well. They may start anew: a script that asks for
            several has its work below `if __name__ == "__main__"`.

    Raises:
        ValueError: a folder that does not exist or is a file.
    """
    closed: list[OSError] = []
    found = dict(_find_files(folders, relative_to, closed))
    names: dict[str, str] = {}  # of the first file with a content
    runs: list[Run] = []
    certificates: list[Certificate] = []
    outcomes: dict[str, Outcome] = {}
    left_out = [_closed_folder(error, relative_to) for error in closed]
    for name, read in _read_all(found, processes, kept):
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
        first = names.setdefault(_digest(read), name)
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


def find_ahead(path: Path) -> None:
    """Keep what is to be found in a record: a report of thousands is then written at once."""
    _read(path, path.name, kept=open_kept(), finds=True)


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


def _read_all(
    found: Mapping[str, Path], processes: int, kept: Kept | None
) -> Iterator[tuple[str, _Read]]:
    """What is in each file, in the order of the names."""
    names = sorted(found)
    paths = [found[name] for name in names]
    processes = min(processes, len(names) // FILES_OF_A_PROCESS)
    with pause_gc():
        if processes < 2:
            read = functools.partial(_read, kept=kept, finds=kept is not None)
            yield from zip(names, map(read, paths, names), strict=True)
            return
        # What has imported torch has threads, which a fork would lack.
        can_fork = sys.platform == "linux" and "torch" not in sys.modules
        context = multiprocessing.get_context("fork" if can_fork else "spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            read = functools.partial(_read, kept=kept, finds=True)
            yield from zip(names, pool.map(read, paths, names, chunksize=CHUNK), strict=True)


def _read(path: Path, name: str, *, kept: Kept | None, finds: bool) -> _Read:
    """What is in a file; `finds`: a run comes with what is costly to find."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return LeftOut(name=name, kind="damaged", reason=f"cannot be read: {error.strerror}")
    if kept is not None and (found := kept.recall(content)) is not None:
        # Seals and fields held when it was found in these very bytes.
        record = orjson.loads(content)
        return Run(name=name, record=record, config=config_of(record), found=found)
    read = _parse(content, name)
    if finds and isinstance(read, Run) and read.is_ok:
        with contextlib.suppress(ValueError):  # told when somebody asks
            found = find(read)
            read = replace(read, found=found)
            if kept is not None:
                kept.keep(content, found)
    return read


def _parse(content: bytes, name: str) -> _Read:
    try:
        record, seals_hold = parse_sealed(content)
    except ValueError as error:
        return LeftOut(name=name, kind="damaged", reason=str(error))
    is_ours = isinstance(record, dict) and record.keys() & {"schema", "step_s"}
    if not is_ours or record.get("kind") == "study":
        return LeftOut(name=name, kind="foreign", reason="not a run record")
    try:
        if is_outcome(record):
            return read_outcome(record, seals_hold=seals_hold)
        if is_certificate(record):
            return read_certificate(record, name)
        config = validate(record, seals_hold=seals_hold)
        if record["status"] == "ok":
            check_facts(record)
    except (ValueError, OverflowError) as error:
        return LeftOut(name=name, kind="damaged", reason=str(error))
    return Run(name=name, record=record, config=config)


def _digest(read: Run | Certificate) -> str:
    """Of the content. The seals of a record, which have been checked, stand for all of it."""
    content = read.content if isinstance(read, Certificate) else read.record[SEALS]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
