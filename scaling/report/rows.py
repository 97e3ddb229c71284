"""Builds one flat row for each single run and each cell of each sweep, and exports them as text.

Values are plain, with units in their names. What ended badly has a row too, with status and reason.
"""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import PurePosixPath
from typing import Any, get_args

from scaling.analysis.proof import find_proof
from scaling.prediction.held_out import HeldOut
from scaling.report.run_formatting import (
    describe_hardware,
    mfu_row,
    network,
    peaks,
    without_paths,
)
from scaling.store.conditions import conditions_of
from scaling.store.outcome import CellOutcome
from scaling.store.reader import Cell, Store
from scaling.store.run import Run
from unitransformer.config import Recipe, RunConfig
from unitransformer.record.fields import HOST_FIELDS, check_fields, is_of_kind, look_up
from unitransformer.record.schema import Status
from unitransformer.record.units import UNIT


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. What is missing is None; `reason` says why there are no figures.

    Rates are of all devices together; low and high are the ends of the 95 % interval of the median
    steady step, as rates. MFU and HFU are shares of the dense peak of the data sheet, shares of the
    ceiling those of what this machine reached in this job; both by the convention of counting FLOPs
    (`unitransformer.costs.flops.CONVENTIONS`). What is predicted comes from a fit without this
    configuration (`scaling.prediction.held_out`), with the ends of its 90 % interval.

    Raises:
        ValueError: a figure is not finite.
    """

    recipe: Recipe
    size: str | None = None
    strategy: str | None = None
    precision: str | None = None
    compile: str | None = None
    activation_checkpointing: str | None = None
    devices: int | None = None  # on each node
    num_nodes: int | None = None
    batch_size: int | None = None  # samples per device and micro-batch
    accumulate: int | None = None  # micro-batches
    global_batch_size: int | None = None  # samples of a step
    sequence_length: int | None = None  # positions of a sample
    seed: int | None = None
    repeat: int | None = None  # from 1
    sweep: str | None = None  # folder of the sweep; None: a single run
    status: Status
    reason: str | None = None
    num_steps: int | None = None
    median_step_s: float | None = None
    low_step_s: float | None = None
    high_step_s: float | None = None
    unit: str  # of the rates: tokens or images
    units_per_s: float | None = None
    low_units_per_s: float | None = None
    high_units_per_s: float | None = None
    units_per_s_per_device: float | None = None
    mean_units_per_s: float | None = None  # all units over all seconds, stalls included
    flops_per_unit_matmul: float | None = None
    mfu_6n: float | None = None
    mfu_palm: float | None = None
    mfu_matmul: float | None = None
    mfu_matmul_causal: float | None = None
    hfu_hardware: float | None = None
    share_of_ceiling_6n: float | None = None
    share_of_ceiling_palm: float | None = None
    share_of_ceiling_matmul: float | None = None
    share_of_ceiling_matmul_causal: float | None = None
    share_of_ceiling_hardware: float | None = None
    peak_bytes: int | None = None  # of the rank with the highest peak
    least_peak_bytes: int | None = None  # of the rank with the lowest peak
    peak_bytes_kind: str | None = None  # what the two count
    peak_resident_bytes: int | None = None  # of the rank with the highest peak
    parity: str | None = None  # verdict of the certificate that covers it
    flags: str | None = None  # what makes the figures doubtful; empty: nothing
    validation_loss: float | None = None  # nats
    commit: str | None = None
    is_dirty: bool | None = None
    torch: str | None = None  # version
    hardware: str | None = None
    conditions: str | None = None  # equal if rows were measured alike
    samples_per_s: float | None = None  # sequences or images, of all devices together
    started_at: str | None = None
    command: str
    record: str | None = None  # name of its file; None: there is none
    network: str | None = None  # backend, transport and interface of its ranks
    predicted_units_per_s: float | None = None
    low_predicted_units_per_s: float | None = None
    high_predicted_units_per_s: float | None = None
    prediction_provenance: str | None = None  # of the speed: fitted, or extrapolated from the fit
    predicted_peak_bytes: int | None = None  # computed, not fitted
    low_predicted_peak_bytes: int | None = None  # None: too few errors are known
    high_predicted_peak_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value} in a row; leave out what is not finite: None")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row, and what it was made of."""

    row: Row
    run: Run | None
    outcome: CellOutcome | None  # None: a single run

    @property
    def config(self) -> RunConfig | None:
        """None if the recipe refused the options."""
        return self.run.config if self.run else self.outcome.config if self.outcome else None


NAMES = tuple(field.name for field in fields(Row))
# Options of a recipe with the same names, but for dashes; rows are sorted by them.
TEXTS = ("size", "strategy", "precision", "compile", "activation_checkpointing")
COUNTS = ("num_nodes", "devices", "batch_size", "accumulate", "sequence_length", "seed")
# A spreadsheet runs text that begins with one of these (OWASP, "CSV injection").
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
RECORDED = {  # by row name; a record of a run that ended badly may hold anything there
    "commit": ("code.commit", str),
    "is_dirty": ("code.is_dirty", bool),
    "torch": ("versions.torch", str),
    "started_at": ("started_at", str),
}


def rows(store: Store) -> list[Row]:
    """Returns every single run and every cell, sorted by their values."""
    return [entry.row for entry in entries(store)]


def entries(store: Store) -> list[Entry]:
    """As `rows`, each with its run and outcome."""
    single = [Entry(row=_of_run(run, store), run=run, outcome=None) for run in store.single_runs]
    cells = [
        Entry(row=_of_cell(cell, store), run=cell.run, outcome=cell.outcome) for cell in store.cells
    ]
    measured = store.successful_runs
    hashes = conditions_of([run.record for run in measured])
    by_name = {run.name: text for run, text in zip(measured, hashes, strict=True)}
    entries = [
        replace(entry, row=replace(entry.row, conditions=by_name.get(entry.row.record or "")))
        for entry in (*single, *cells)
    ]
    return sorted(entries, key=lambda entry: _place(entry.row))


def with_predictions(rows: Sequence[Row], found: Sequence[HeldOut]) -> list[Row]:
    """Returns the rows, those of measured configurations with what is predicted for them."""
    columns = {run.name: _predicted(item) for item in found for run in item.runs}
    return [replace(row, **columns.get(row.record or "", {})) for row in rows]


def _predicted(item: HeldOut) -> dict[str, Any]:
    units, step, memory = item.run.units_per_step, item.step_s, item.memory_bytes
    values: dict[str, Any] = {
        "predicted_units_per_s": units / step.value,
        "low_predicted_units_per_s": units / step.high,
        "high_predicted_units_per_s": units / step.low,
        "prediction_provenance": item.provenance,
    }
    if memory is not None:
        values["predicted_peak_bytes"] = round(memory.value)
        if memory.low < memory.high:
            values["low_predicted_peak_bytes"] = round(memory.low)
            values["high_predicted_peak_bytes"] = round(memory.high)
    return values


def _place(row: Row) -> tuple[Any, ...]:
    names = ("sweep", *TEXTS, *COUNTS, "repeat", "started_at", "record", "command")
    values = [getattr(row, name) for name in names]
    return (get_args(Recipe).index(row.recipe), *((value is not None, value) for value in values))


def _of_run(run: Run, store: Store) -> Row:
    # The number at the end of a record's name; other files may have any name.
    number = re.search(r"-(\d+)$", PurePosixPath(run.name).stem)
    return Row(
        recipe=run.config.recipe,
        unit=UNIT[run.config.recipe],
        status=run.record["status"],
        command=run.record["command"],
        repeat=None if number is None else int(number[1]),
        **_configured(run.config),
        **_recorded(run),
        **(_measured(run, store) if run.is_ok else {"reason": _error(run)}),
    )


def _of_cell(cell: Cell, store: Store) -> Row:
    """Takes the end from the outcome, and what was measured from the record."""
    outcome, run = cell.outcome, cell.run
    config = outcome.config if run is None else run.config
    values: dict[str, Any] = _options(outcome) if config is None else _configured(config)
    values["started_at"] = outcome.started_at
    if run is not None:
        values |= _recorded(run) | (_measured(run, store) if cell.successful_run else {})
    elif outcome.record is not None:
        name = PurePosixPath(cell.name).with_name(outcome.record).as_posix()
        why = next((file.reason for file in store.left_out if file.name == name), "it is not there")
        values["reason"] = f"no figures, the record {name} is not used: {why}"
    if reason := outcome.reason or values.get("reason"):
        values["reason"] = without_paths(reason, run.record["hardware"] if run else [])
    return Row(
        recipe=outcome.recipe,
        unit=UNIT[outcome.recipe],
        status=outcome.status,
        command=outcome.command,
        repeat=outcome.repeat,
        sweep=cell.sweep,
        **values,
    )


def _options(outcome: CellOutcome) -> dict[str, Any]:
    """Returns the options of a cell that the recipe refused, so that there is no config."""
    options = {name.replace("-", "_"): str(value) for name, value in outcome.options.items()}
    counts = {name: int(options[name]) for name in COUNTS if options.get(name, "").isdecimal()}
    return {name: options[name] for name in TEXTS if name in options} | counts


def _configured(config: RunConfig) -> dict[str, Any]:
    names, parallel = (*TEXTS, *COUNTS, "global_batch_size"), vars(config.parallel)
    return {name: parallel[name] if name in parallel else getattr(config, name) for name in names}


def _recorded(run: Run) -> dict[str, Any]:
    return {
        **{
            name: value
            for name, (field, kind) in RECORDED.items()
            if is_of_kind(value := look_up(run.record, field), kind)
        },
        "num_steps": run.num_steps,
        "hardware": _hardware(run.record["hardware"]),
        "record": run.name,
        "network": network(run) or None,
    }


def _hardware(ranks: list[Any]) -> str | None:
    try:
        for rank, host in enumerate(ranks):
            check_fields(host, HOST_FIELDS, f"hardware.{rank}", missing=None)
    except ValueError:
        return None
    return describe_hardware(ranks) if ranks else None


def _error(run: Run) -> str:
    error = run.record["error"]
    if error is None:
        return "the record holds no error"
    text = f"{error.get('type') or 'error of unknown type'}: {error.get('message') or ''}"
    return without_paths(text.removesuffix(": "), run.record["hardware"])


def _measured(run: Run, store: Store) -> dict[str, Any]:
    record = run.record
    values: dict[str, Any] = {"reason": f"no steady state: {record['no_steady_state_reason']}"}
    if (metrics := run.metrics) is not None:
        values = {
            "reason": None,
            "median_step_s": metrics.step.median,
            "low_step_s": metrics.step.low,
            "high_step_s": metrics.step.high,
            "units_per_s": metrics.units_per_s,
            "samples_per_s": run.config.global_batch_size / metrics.step.median,
            "low_units_per_s": metrics.low_units_per_s,
            "high_units_per_s": metrics.high_units_per_s,
            "units_per_s_per_device": metrics.units_per_s / run.config.parallel.world_size,
            "mean_units_per_s": metrics.mean_units_per_s,
        }
    return values | {
        **{f"{row.kind.lower()}_{row.convention}": row.utilisation for row in run.mfu},
        **{f"share_of_ceiling_{row.convention}": row.share_of_ceiling for row in run.mfu},
        "flops_per_unit_matmul": mfu_row(run).flops_per_unit,
        "peak_bytes": max(peaks(run), default=None),
        "least_peak_bytes": min(peaks(run), default=None),
        "peak_bytes_kind": record["peak_bytes_kind"],
        "peak_resident_bytes": max(peaks(run, "peak_resident_bytes"), default=None),
        "parity": _parity(run, store),
        "flags": "; ".join(record["flags"]),
        "validation_loss": record["validation"]["loss"],
    }


def _parity(run: Run, store: Store) -> str:
    proof = find_proof(run, store.certificates)
    if proof is None:
        return "none"
    if proof.certificate is None:
        return proof.verdict
    devices = " and ".join(map(str, proof.devices))
    return f"{proof.verdict} on devices {devices}, {proof.certificate}"


def to_csv(rows: Sequence[Row]) -> str:
    """Returns a header and a line for each row (RFC 4180); missing values are blank.

    Text that a spreadsheet would run as a formula begins with an apostrophe.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(NAMES)
    writer.writerows([_cell(getattr(row, name)) for name in NAMES] for row in rows)
    return file.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return str(value)


def to_json(rows: Sequence[Row]) -> str:
    """Returns a list of objects in the order of the rows, names sorted, missing values null."""
    return json.dumps([vars(row) for row in rows], sort_keys=True, indent=1, allow_nan=False) + "\n"
