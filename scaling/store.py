"""The store: folders go in; run records and certificates come out, and the files that are neither.

A record that cannot be relied on is left out with its reason and never stops the others. Names of
files are relative to a folder the caller gives, so that what is made of them can be moved.
"""

import contextlib
import functools
import gc
import hashlib
import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any, Literal

from scaling.certificate_files import is_certificate, read_certificate
from scaling.certificates import Certificate
from scaling.checks import (
    HOST,
    NUMBER,
    RELATIVE_ERROR,
    Kinds,
    check_fields,
    check_lists,
    fits,
    look_up,
)
from scaling.outcomes import Outcome, is_outcome, read_outcome
from unitransformer.calibrating.store import read_ceiling
from unitransformer.checkpoint_names import is_checkpoint_name
from unitransformer.config import RunConfig
from unitransformer.flops import count_flops, count_parameters
from unitransformer.log_lines import log_lines
from unitransformer.passport import Row
from unitransformer.readout import Readout, passport_of, read_out, recorded_steady, steady_of
from unitransformer.records import Record, validate
from unitransformer.sealed import SEALS, read_sealed
from unitransformer.statistics.comparisons import Launch, describe_launch
from unitransformer.statistics.steady import Steady
from unitransformer.tasks import perplexity

FILES_OF_A_PROCESS = 500  # fewer are read before another process has started
CHUNK = 50  # files that go to a process at once

# What is read of a run that ended well, beyond what `records.validate` looks at.
FACTS: dict[str, Kinds] = {
    "num_parameters": int,
    "code.commit": (str, NoneType),
    "code.is_dirty": (bool, NoneType),
    "data.description": str,
    "data.sha256": (str, NoneType),
    "steady_method": str,
    "steady_reason": (str, NoneType),
    "peak_bytes_kind": str,
    "validation.loss": NUMBER,
    "validation.metric": str,
    "validation.value": NUMBER,
    "validation.baseline": (dict, NoneType),
}
LISTS: dict[str, Kinds] = {
    "hardware": dict,
    "launches": int,
    "log": str,
    "flags": str,
    "unsteady": dict,
    "ceiling": (dict, NoneType),
    "compile": dict,
    "gpu": (dict, NoneType),
    "peak_bytes": (int, NoneType),
    "peak_reserved_bytes": (int, NoneType),
    "peak_resident_bytes": (int, NoneType),
    "validation.history": dict,
}
OF_EVERY_RANK = ("hardware", "ceiling", "compile", "peak_bytes")
UNSTEADY: dict[str, Kinds] = {"step": int, "reason": str}
LEDGER: dict[str, Kinds] = {
    "mode": str,
    "start": (str, NoneType),
    "compile_s": (*NUMBER, NoneType),
    "graphs": (int, NoneType),
}
GPU: dict[str, Kinds] = {
    "joules": (*NUMBER, NoneType),
    "joules_of_steps": (int, NoneType),
    "untold": dict,
}
LOOK: dict[str, Kinds] = {
    "sm_clock_hz": (*NUMBER, NoneType),
    "memory_clock_hz": (*NUMBER, NoneType),
    "power_w": (*NUMBER, NoneType),
    "temperature_c": (*NUMBER, NoneType),
    "clock_reasons": (list, NoneType),
}
LEDGER_LISTS: dict[str, Kinds] = {"graph_breaks": dict, "recompiles": dict}
BREAK: dict[str, Kinds] = {"where": str, "reason": str}
RECOMPILE: dict[str, Kinds] = {
    "step": (int, NoneType),
    "function": str,
    "reason": (str, NoneType),
}
BASELINE: dict[str, Kinds] = {
    "name": str,
    "loss": (*NUMBER, NoneType),
    "accuracy": (*NUMBER, NoneType),
}
POINT: dict[str, Kinds] = {"step": int, "val_loss": NUMBER, "val_accuracy": NUMBER}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A record, and what its raw samples say; derived fields of the record are not believed."""

    name: str  # of its file
    record: Record
    config: RunConfig

    @property
    def is_ok(self) -> bool:
        return bool(self.record["status"] == "ok")

    @property
    def num_steps(self) -> int:
        """Optimizer steps that were done."""
        return len(self.record["loss"])

    @property
    def unit(self) -> Literal["token", "image"]:
        return "image" if self.config.recipe == "vit" else "token"

    @property
    def units_per_step(self) -> int:
        return self.config.global_batch_size * self.config.tokens_per_sample

    @property
    def unsteady(self) -> list[int]:
        """Steps that were measured otherwise than the rest, or compiled."""
        return [item["step"] for item in self.record["unsteady"]]

    @functools.cached_property
    def log(self) -> list[str]:
        """Its lines over all ranks, out of the samples."""
        record = self.record
        return log_lines(
            self.config,
            loss=record["loss"],
            step_s=record["step_s"],
            launches=record["launches"],
            validation=record["validation"]["history"] if self.is_ok else [],
        )

    @functools.cached_property
    def readout(self) -> Readout | None:
        """Figures of the steady steps, out of the samples; None without a steady state."""
        record = self.record
        return read_out(
            record["step_s"],
            record["samples"],
            recorded_steady(record),
            launches=record["launches"],
            units_per_step=self.units_per_step,
        )

    @functools.cached_property
    def steady_today(self) -> Steady:
        """The steady state of the last launch as this version of the code finds it."""
        record = self.record
        return steady_of(record["step_s"], launches=record["launches"], unsteady=self.unsteady)

    @functools.cached_property
    def launch(self) -> Launch:
        """Its steady steps beside those of other launches."""
        return describe_launch(self.steady_s)

    @property
    def steady_s(self) -> list[float]:
        """Seconds of each steady step."""
        record = self.record
        return recorded_steady(record).of(record["step_s"][record["launches"][-1] :])

    @property
    def units_per_s(self) -> float | None:
        return None if self.readout is None else self.readout.units_per_s

    @functools.cached_property
    def passport(self) -> tuple[Row, ...]:
        """What each way of counting FLOPs says of the run, out of the samples."""
        record = self.record
        return passport_of(self.config, self.units_per_s, record["hardware"], record["ceiling"])

    @property
    def metric_value(self) -> float:
        """Perplexity out of the validation loss; an accuracy is itself a raw count."""
        validation = self.record["validation"]
        if validation["metric"] == "perplexity":
            return perplexity(validation["loss"])
        return float(validation["value"])


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


def load_store(folders: Sequence[Path], *, relative_to: Path, processes: int = 1) -> Store:
    """Read every `*.json` below `folders`, what is hidden and checkpoints aside.

    Args:
        relative_to: folder from which the names lead to the files.
        processes: at most so many read beside each other, where there are thousands of files.
            They find the figures of the runs as well. They start anew: a script that asks for
            several has its work below `if __name__ == "__main__"`.

    Raises:
        ValueError: a folder that does not exist or is a file.
    """
    closed: list[OSError] = []
    found = {relative_name(path, relative_to): path for path in _find_files(folders, closed)}
    names: dict[str, str] = {}  # of the first file with a content
    runs: list[Run] = []
    certificates: list[Certificate] = []
    outcomes: dict[str, Outcome] = {}
    left_out = [_closed_folder(error, relative_to) for error in closed]
    for name, read in _read_all(found, processes):
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


def find_contradictions(run: Run) -> list[str]:
    """Derived fields of a run that ended well that its own samples and config contradict."""
    rate, record = f"{run.unit}s_per_s", run.record
    figures = {} if run.readout is None else run.readout.as_dict()
    return _differences(
        {
            rate: (record.get(rate), run.units_per_s),
            **{
                f"figures.{name}": (record["figures"].get(name), figures.get(name))
                for name in sorted(record["figures"].keys() | figures.keys())
            },
            "num_parameters": (record["num_parameters"], count_parameters(run.config.model)),
            "validation.value": (record["validation"]["value"], run.metric_value),
        }
    )


def find_recounts(run: Run) -> list[str]:
    """FLOPs, and the begin of the steady state, that this version of the code finds otherwise than
    the one that wrote the record."""
    field, record = f"flops_per_{run.unit}", run.record
    start = run.steady_today.start
    start = None if start is None else record["launches"][-1] + start
    return _differences(
        {
            "steady_from": (record["steady_from"], start),
            **{
                f"{field}.{name}": (look_up(run.record, f"{field}.{name}"), count)
                for name, count in count_flops(run.config).items()
            },
        }
    )


def _differences(fields: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"{field} is {_said(stored)} in the record, {_said(derived)} by its samples and config"
        for field, (stored, derived) in fields.items()
        if not _agree(stored, derived)
    ]


def _agree(stored: Any, derived: Any) -> bool:
    if derived is None or isinstance(derived, str):
        return bool(stored == derived)
    return fits(stored, NUMBER) and math.isclose(stored, derived, rel_tol=RELATIVE_ERROR)


def _said(value: Any) -> str:
    return "nothing" if value is None else repr(value)


# ---------------------------------------------------------------------------------- files


def _find_files(folders: Sequence[Path], closed: list[OSError]) -> Iterator[Path]:
    """Every candidate; folders that cannot be listed are added to `closed`."""
    for folder in folders:
        if not folder.exists():
            raise ValueError(f"{folder} does not exist; give a folder that holds run records")
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file; give the folder it is in")
        for place, inner, files in os.walk(folder, onerror=closed.append):
            inner[:] = [n for n in inner if not (n.startswith(".") or is_checkpoint_name(n))]
            for name in files:
                if name.endswith(".json") and not name.startswith("."):
                    yield Path(place, name)


def _closed_folder(error: OSError, relative_to: Path) -> LeftOut:
    name = relative_name(Path(error.filename), relative_to)
    return LeftOut(name=name, kind="damaged", reason=f"cannot be read: {error.strerror}")


def _read_all(found: Mapping[str, Path], processes: int) -> Iterator[tuple[str, _Read]]:
    """What is in each file, in the order of the names."""
    names = sorted(found)
    paths = [found[name] for name in names]
    processes = min(processes, len(names) // FILES_OF_A_PROCESS)
    with no_collection():
        if processes < 2:
            yield from zip(names, map(_read, paths, names), strict=True)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            read = pool.map(_read_and_figure, paths, names, chunksize=CHUNK)
            yield from zip(names, read, strict=True)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Records hold no cycles, and a search for them goes through all records again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_and_figure(path: Path, name: str) -> _Read:
    """As `_read`; a run comes with what is costly to find."""
    read = _read(path, name)
    if isinstance(read, Run) and read.is_ok:
        with contextlib.suppress(ValueError):  # told when somebody asks
            _ = read.readout, read.steady_today
            _ = read.readout and read.launch
    return read


def _read(path: Path, name: str) -> _Read:
    try:
        record, seals_hold = read_sealed(path)
    except ValueError as error:
        return LeftOut(name=name, kind="damaged", reason=str(error))
    except OSError as error:
        return LeftOut(name=name, kind="damaged", reason=f"cannot be read: {error.strerror}")
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
            _check_facts(record)
    except (ValueError, OverflowError) as error:
        return LeftOut(name=name, kind="damaged", reason=str(error))
    return Run(name=name, record=record, config=config)


def _digest(read: Run | Certificate) -> str:
    """Of the content. The seals of a record, which have been checked, stand for all of it."""
    content = read.content if isinstance(read, Certificate) else read.record[SEALS]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------- checks


def _check_facts(record: Record) -> None:
    """Raises ValueError for the first fact that a report needs and this record does not have."""
    check_fields(record, FACTS, "record")
    check_lists(record, LISTS, "record")
    for field in (*OF_EVERY_RANK, "launches"):
        if not record[field]:
            raise ValueError(f"record: {field} is empty")
    for index, item in enumerate(record["unsteady"]):
        check_fields(item, UNSTEADY, f"record: unsteady.{index}")
    for rank, ceiling in enumerate(record["ceiling"]):
        if ceiling is not None:
            read_ceiling(ceiling, f"record: ceiling.{rank}")
    for rank, gpu in enumerate(record["gpu"]):
        if gpu is not None:
            check_fields(gpu, GPU, f"record: gpu.{rank}")
            check_lists(gpu, {"samples": dict}, f"record: gpu.{rank}")
            _check_items(gpu, "samples", LOOK, f"record: gpu.{rank}")
    for rank, ledger in enumerate(record["compile"]):
        where = f"record: compile.{rank}"
        check_fields(ledger, LEDGER, where)
        check_lists(ledger, LEDGER_LISTS, where)
        _check_items(ledger, "graph_breaks", BREAK, where)
        _check_items(ledger, "recompiles", RECOMPILE, where)
    for rank, host in enumerate(record["hardware"]):
        check_fields(host, HOST, f"record: hardware.{rank}", missing=None)
    _check_items(record["validation"], "history", POINT, "record: validation")
    if record["validation"]["baseline"] is not None:
        check_fields(record["validation"]["baseline"], BASELINE, "record: validation.baseline")
    _check_times(record)


def _check_items(
    values: Mapping[str, Any], field: str, kinds: Mapping[str, Kinds], where: str
) -> None:
    for index, item in enumerate(values[field]):
        check_fields(item, kinds, f"{where}.{field}.{index}")


def _check_times(record: Record) -> None:
    steps, start = len(record["step_s"]), record["steady_from"]
    if min(record["step_s"]) <= 0:
        raise ValueError("record: step_s holds a step that took no time")
    if start is not None and not record["launches"][-1] <= start < steps:
        raise ValueError(f"record: steady_from is {start}, outside the last launch's steps")
