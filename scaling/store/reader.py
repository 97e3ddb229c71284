"""Loads run records, cell outcomes and certificates from folders.

A damaged file is left out with its reason and never stops the others. File names are relative to a
folder that the caller gives, so that a report can be moved together with its records.
"""

import functools
import hashlib
import json
import os
import stat
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from scaling.parity.certificate import Certificate
from scaling.parity.certificate_file import is_certificate, read_certificate
from scaling.paths import why_missing
from scaling.peers.record import Comparison, is_comparison, read_comparison
from scaling.store.outcome import CELLS, STUDY, CellOutcome, is_outcome, read_outcome
from scaling.store.required_fields import check_required_fields
from scaling.store.run import Run
from scaling.store.self_test import SelfTest, is_self_test, read_self_test
from unitransformer.checkpoint.names import is_checkpoint_name
from unitransformer.launch.gc_pause import pause_gc
from unitransformer.machine.calibration_store import SCHEMA_FIELD
from unitransformer.record.checksums import CHECKSUMS, Field, parse_json, verify_checksums
from unitransformer.record.schema import Record, read_record
from unitransformer.record.slurm_job import SlurmJob, is_job, read_job


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One repeat of a sweep cell: its outcome, and its run if it left a record."""

    name: str  # of the outcome file
    outcome: CellOutcome
    run: Run | None

    @functools.cached_property
    def sweep(self) -> str:
        """The folder of its sweep."""
        return str(PurePosixPath(self.name).parent.parent.parent)

    @property
    def successful_run(self) -> Run | None:
        """Its run if both ended well: a run can hang or crash after it has written its record."""
        is_ok = self.outcome.status == "ok" and self.run is not None and self.run.is_ok
        return self.run if is_ok else None


@dataclass(frozen=True, kw_only=True)
class UnusedFile:
    """A file that is left out. Damaged: meant to be a record. Own: another file of this suite."""

    name: str
    kind: Literal["damaged", "foreign", "duplicate", "own"]
    reason: str
    study: Mapping[str, Any] | None = None  # the fields that it holds of a study


@dataclass(frozen=True, kw_only=True)
class Store:
    """The content of the folders, sorted by file name."""

    runs: tuple[Run, ...]
    left_out: tuple[UnusedFile, ...]
    certificates: tuple[Certificate, ...] = ()
    comparisons: tuple[Comparison, ...] = ()  # with peers
    self_tests: tuple[SelfTest, ...] = ()  # of regression checks
    cells: tuple[Cell, ...] = ()
    jobs: Mapping[str, SlurmJob] = field(default_factory=dict)  # by the names of their files
    own_files: tuple[str, ...] = ()  # names of files that a sweep, a trace or a calibration wrote
    # The fields of each study by the folder of its sweep; a search of batch sizes has none.
    studies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @functools.cached_property
    def single_runs(self) -> tuple[Run, ...]:
        """Runs that are not a cell of a sweep."""
        of_cells = {cell.run.name for cell in self.cells if cell.run is not None}
        return tuple(run for run in self.runs if run.name not in of_cells)

    @functools.cached_property
    def failures(self) -> dict[str, str]:
        """Why a run is no measurement, by its name: how it ended, or how its cell did."""
        failed = {run.name: f"status {run.record['status']}" for run in self.runs if not run.is_ok}
        for cell in self.cells:
            if cell.run is not None and cell.run.is_ok and not cell.successful_run:
                failed[cell.run.name] = f"its cell ended as {cell.outcome.status}"
        return failed

    @functools.cached_property
    def successful_runs(self) -> tuple[Run, ...]:
        """Runs that ended well, as did their cells: these alone are measurements."""
        return tuple(run for run in self.runs if run.name not in self.failures)


# None: rows of a report.
_Loaded = Run | Certificate | Comparison | SelfTest | CellOutcome | SlurmJob | UnusedFile | None
ROW_FIELDS = {"recipe", "status", "units_per_s", "command"}  # that every `report --json` has

# Of other files of this suite: a sweep, a comparison; a calibration, the shares of a trace.
OWN_KINDS = ("study", "largest-batches", "paired-steps")
OWN_FIELDS = {SCHEMA_FIELD, "head_by"}


def load_store(folders: Sequence[Path], *, relative_to: Path) -> Store:
    """Reads every `*.json` below `folders` except hidden files and checkpoints.

    Args:
        relative_to: folder that the file names are relative to.

    Raises:
        ValueError: a folder that does not exist or is a file.
    """
    unreadable: list[OSError] = []
    paths = dict(_find_files(folders, relative_to, unreadable))
    first_names: dict[Hashable, str] = {}  # of the first file with a content
    runs: list[Run] = []
    certificates: list[Certificate] = []
    comparisons: list[Comparison] = []
    self_tests: list[SelfTest] = []
    outcomes: dict[str, CellOutcome] = {}
    jobs: dict[str, SlurmJob] = {}
    own: list[UnusedFile] = []
    left_out = [
        _damaged(relative_name(Path(error.filename), relative_to), error) for error in unreadable
    ]
    # Records of one machine share fields, which are parsed and checked once.
    known, like = dict[bytes, Field](), None
    with pause_gc():
        for name, path in sorted(paths.items()):
            content = _load(path, name, known, like)
            if content is None:
                continue
            if isinstance(content, UnusedFile):
                (own if content.kind == "own" else left_out).append(content)
            elif (first := first_names.setdefault(_identity(content), name)) != name:
                reason = f"the same as {first}"
                left_out.append(UnusedFile(name=name, kind="duplicate", reason=reason))
            elif isinstance(content, CellOutcome):
                outcomes[name] = content
            elif isinstance(content, SlurmJob):
                jobs[name] = content
            elif isinstance(content, Certificate):
                certificates.append(content)
            elif isinstance(content, Comparison):
                comparisons.append(content)
            elif isinstance(content, SelfTest):
                self_tests.append(content)
            else:
                runs.append(content)
                like = content.record if content.is_ok else like
    runs, unfinished = _split_unfinished(runs, outcomes, paths)
    return Store(
        runs=tuple(runs),
        left_out=tuple(sorted([*left_out, *unfinished], key=lambda file: file.name)),
        certificates=tuple(certificates),
        comparisons=tuple(comparisons),
        self_tests=tuple(self_tests),
        cells=tuple(_cells(outcomes, runs)),
        jobs=jobs,
        own_files=tuple(file.name for file in own),
        studies={
            str(PurePosixPath(file.name).parent): file.study
            for file in own
            if file.study is not None
        },
    )


def _cells(outcomes: Mapping[str, CellOutcome], runs: Sequence[Run]) -> Iterator[Cell]:
    by_name = {run.name: run for run in runs}
    for name, outcome in outcomes.items():
        run = None
        if outcome.record is not None:
            run = by_name.get(PurePosixPath(name).with_name(outcome.record).as_posix())
        yield Cell(name=name, outcome=outcome, run=run)


def _split_unfinished(
    runs: Sequence[Run], outcomes: Iterable[str], names: Iterable[str]
) -> tuple[list[Run], list[UnusedFile]]:
    """Leaves out records of cells without an outcome: they are running, or their sweep was killed.

    Such a record is not a single run either. A sweep holds a study, or a cell with an outcome.
    """
    cells = {PurePosixPath(name).parent for name in outcomes}
    studies = (PurePosixPath(name) for name in names if name.endswith(STUDY))
    sweeps = {cell.parent for cell in cells}
    sweeps |= {path.with_name(CELLS) for path in studies if path.name == STUDY}
    finished, unfinished = [], []
    for run in runs:
        folder = PurePosixPath(run.name).parent
        if folder.parent.name == CELLS and folder.parent in sweeps and folder not in cells:
            reason = "of a cell without an outcome: it is under way, or its sweep was stopped"
            unfinished.append(UnusedFile(name=run.name, kind="foreign", reason=reason))
        else:
            finished.append(run)
    return finished, unfinished


def relative_name(path: Path, folder: Path) -> str:
    """Returns the path from `folder` to `path`, links resolved, with slashes on every system."""
    # `Path.resolve` raises where links lead in a circle.
    return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix()


def _find_files(
    folders: Sequence[Path], relative_to: Path, unreadable: list[OSError]
) -> Iterator[tuple[str, Path]]:
    """Yields the name and path of each candidate; appends errors of folders to `unreadable`."""
    for folder in folders:
        if not folder.exists():
            raise ValueError(
                f"{folder} {why_missing(folder)}; give a folder that holds run records"
            )
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file; give the folder it is in")
        for place, inner, files in os.walk(folder, onerror=unreadable.append):
            inner[:] = [n for n in inner if not (n.startswith(".") or is_checkpoint_name(n))]
            files = [name for name in files if name.endswith(".json") and not name.startswith(".")]
            if not files:
                continue
            prefix = relative_name(Path(place), relative_to)  # once, not for each of thousands
            for name in files:
                path = Path(place, name)
                # A link that leads to no file has no name but its own.
                if path.is_symlink() and os.path.isfile(path):
                    yield relative_name(path, relative_to), path
                else:
                    yield name if prefix == "." else f"{prefix}/{name}", path


def _damaged(name: str, error: Exception) -> UnusedFile:
    reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
    return UnusedFile(name=name, kind="damaged", reason=reason)


def _load(path: Path, name: str, known: dict[bytes, Field], like: Record | None) -> _Loaded:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device may never end
            raise ValueError("not a regular file")
        return _interpret(*parse_json(path.read_bytes(), known), name, like)
    except (OSError, ValueError, OverflowError) as error:
        return _damaged(name, error)


def _interpret(record: Any, checksums_hold: bool, name: str, like: Record | None) -> _Loaded:
    items = record if isinstance(record, list) else []
    if items and all(isinstance(item, dict) and item.keys() >= ROW_FIELDS for item in items):
        return None
    fields = record if isinstance(record, dict) else {}
    if fields.get("kind") in OWN_KINDS or fields.keys() & OWN_FIELDS:
        study = fields.get("study") if fields.get("find_max_batch") is None else None
        if study is not None and not checksums_hold:
            verify_checksums(fields, name)
        return UnusedFile(name=name, kind="own", reason="not a record", study=study)
    if not fields.keys() & {"schema", "step_s"}:
        return UnusedFile(name=name, kind="foreign", reason="not a run record")
    if is_outcome(record):
        return read_outcome(record, checksums_hold=checksums_hold)
    if is_job(record):
        return read_job(record, name)
    if is_certificate(record):
        return read_certificate(record, name)
    if is_comparison(record):
        return read_comparison(record, name)
    if is_self_test(record):
        return read_self_test(record, name, checksums_hold=checksums_hold)
    record, config = read_record(record, checksums_hold=checksums_hold)
    if record["status"] == "ok":
        check_required_fields(record, like)
    run = Run(name=name, record=record, config=config)
    if run.is_ok:
        _ = run.mfu  # raises if its rows contradict each other
    return run


def _identity(
    content: Run | Certificate | Comparison | SelfTest | CellOutcome | SlurmJob,
) -> Hashable:
    """Equal for equal contents; a record's verified checksums stand for all of it."""
    if isinstance(content, Run):
        return frozenset(content.record[CHECKSUMS].items())
    if isinstance(content, SelfTest):
        return frozenset(content.content[CHECKSUMS].items())
    if isinstance(content, CellOutcome | SlurmJob):
        return repr(content)
    return hashlib.sha256(json.dumps(content.content, sort_keys=True).encode()).hexdigest()
