"""A run that ended, well or not, in; its record out."""

import math
import os
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unitransformer.config import RunConfig, to_dict
from unitransformer.costs.flops import count_flops, count_parameters
from unitransformer.costs.mfu import MfuRow
from unitransformer.data.datamodule import DataModule
from unitransformer.launch.environment import process_rank
from unitransformer.launch.failures import RankFailure, amend_record, describe_failure, find_errno
from unitransformer.launch.signals import Stopped
from unitransformer.machine.host import describe_host
from unitransformer.machine.software import describe_code, describe_versions
from unitransformer.measure.communication import why_communication_missing
from unitransformer.measure.host_load import HostLoad, load_between
from unitransformer.measure.nvml import energy_between_samples
from unitransformer.record.metrics import Readout, passport_of, read_out, steady_of
from unitransformer.record.parameter_summary import render_summary, summarise
from unitransformer.record.schema import (
    OPTIONAL_SAMPLES,
    SAMPLES,
    SCHEMA,
    Record,
    Status,
    write_record,
)
from unitransformer.record.units import METRIC, UNIT, metric_value
from unitransformer.training.history import History
from unitransformer.transformer import Transformer

KEPT_LINES = 40  # log lines in a record
# Of every rank, as its instruments tell them.
READINGS = (
    *("hardware", "gpu", "ceiling", "compile", "recomputed_layers", "trace"),
    *("peak_bytes", "peak_reserved_bytes", "peak_resident_bytes", "tensor_bytes"),
)
PEAK_KIND = {"cuda": "allocated", "cpu": "tensors"}


def build_record(
    config: RunConfig,
    data: DataModule,
    history: History,
    readings: Sequence[Mapping[str, Any]],
    lines: list[str],
    error: BaseException | None,
) -> Record:
    """The record.

    Args:
        readings: of the instruments of each rank, or of this one if an error stopped the run.
    """
    samples = {name: getattr(history, name) for name in (*SAMPLES, *OPTIONAL_SAMPLES)}
    untold = why_communication_missing(config.parallel, config.parallel.accelerator)
    unsteady = _unsteady(readings, history)
    steady = steady_of(
        history.step_s, launches=history.segments, unsteady=[item["step"] for item in unsteady]
    )
    readout = read_out(
        history.step_s,
        samples,
        steady,
        launches=history.segments,
        units_per_step=config.global_batch_size * config.tokens_per_sample,
    )
    units_per_s = None if readout is None else readout.units_per_s
    told = {name: [reading[name] for reading in readings] for name in READINGS}
    first = history.segments[-1]
    steps = [first + step for step in steady.steps(len(history.step_s[first:]))]
    told["gpu"] = [_with_energy(gpu, steps) for gpu in told["gpu"]]
    loads = _loads(readings)
    passport = passport_of(config, units_per_s, told["hardware"], told["ceiling"])
    steady_from = None if steady.start is None else history.segments[-1] + steady.start
    return {
        **_describe(config),
        "status": _status(error),
        "data": {"description": data.source.description, "sha256": data.source.sha256},
        "launches": history.segments,
        "loss": history.loss,
        "learning_rate": [
            config.optimizer.learning_rate_at(step) for step in range(history.num_steps)
        ],
        # None: it overflowed in float16, and the step was skipped.
        "gradient_norm": [n if math.isfinite(n) else None for n in history.gradient_norm],
        "step_s": history.step_s,
        "samples": samples,
        "samples_untold": {} if untold is None else {"communication_s": untold},
        "unsteady": unsteady,
        "steady_from": steady_from,
        "steady_method": steady.method,
        "steady_reason": steady.reason,
        "figures": {} if readout is None else readout.as_dict(),
        f"{UNIT[config.recipe]}_per_s": units_per_s,
        "passport": [asdict(row) for row in passport],
        "flags": [
            *_flags(readings, loads, passport),
            *_compiled_late(told["compile"], steady_from),
            *_too_wide(config, readout),
        ],
        "host_load": [load.as_dict() for load in loads],
        **told,
        "peak_bytes_kind": PEAK_KIND[config.parallel.accelerator],
        "validation": _validation(config, data, history) if error is None else {},
        "log": lines[-KEPT_LINES:],
        "error": None if error is None else _describe_error(error),
    }


def _unsteady(readings: Sequence[Mapping[str, Any]], history: History) -> list[dict[str, Any]]:
    """Steps that some rank measured otherwise than the rest, or compiled: why, in words."""
    reasons: dict[int, str] = {}
    for reading in readings:
        reasons |= {int(step): words for step, words in reading["unsteady"].items()}
    return [
        {"step": step, "reason": reasons[step]}
        for step in sorted(reasons)
        if step < history.num_steps
    ]


def _with_energy(gpu: Mapping[str, Any], steps: Collection[int]) -> dict[str, Any]:
    """What a GPU told of itself, and its joules in the steady steps."""
    energy = energy_between_samples(gpu["samples"], set(steps))
    reason = {} if energy.reason is None else {"joules": energy.reason}
    return {**gpu, **energy.as_dict(), "untold": reason | gpu["untold"]}


def _loads(readings: Sequence[Mapping[str, Any]]) -> list[HostLoad]:
    """What else each machine did while its ranks trained; nothing of those that did not end."""
    machines: dict[str, list[Mapping[str, Any]]] = {}
    for reading in readings:
        if reading["host"] is not None:
            machines.setdefault(reading["hardware"]["hostname"], []).append(reading)
    return [
        load_between(*zip(*(rank["host"] for rank in ranks), strict=True), num_cores=cores)
        for ranks in machines.values()
        if (cores := os.cpu_count())
    ]


def _compiled_late(ledgers: Sequence[Mapping[str, Any]], steady_from: int | None) -> list[str]:
    """Steps of the timed window that were held up by the compiler."""
    if steady_from is None:
        return []
    steps = {step for ledger in ledgers for step in ledger["steps"] if step >= steady_from}
    return [f"compiled again at step {step + 1}, in the timed window" for step in sorted(steps)]


def _too_wide(config: RunConfig, readout: Readout | None) -> list[str]:
    """An interval that was to become narrow and has not."""
    if config.until_interval is None:
        return []
    width = None if readout is None else readout.step.relative_width
    if width is not None and width <= config.until_interval:
        return []
    reached = "there is none" if width is None else f"it is {width:.1%} wide"
    return [f"the interval was to be {config.until_interval:.1%} wide, and {reached}"]


def _flags(
    readings: Sequence[Mapping[str, Any]],
    loads: Sequence[HostLoad],
    passport: Sequence[MfuRow],
) -> list[str]:
    """What makes the figures doubtful, in words; each once, with the ranks that saw it."""
    ranks: dict[str, list[int]] = {}
    for rank, reading in enumerate(readings):
        for flag in reading["flags"]:
            ranks.setdefault(flag, []).append(rank)
    told = [
        flag if len(readings) == 1 else f"{flag} (rank {', '.join(map(str, seen))})"
        for flag, seen in ranks.items()
    ]
    told += [flag for load in loads for flag in load.flags()]
    return told + [f"{row.convention}: {row.flag}" for row in passport if row.flag]


def _describe(config: RunConfig) -> Record:
    """What is known of a run before it begins."""
    per_unit = "flops_per_image" if config.recipe == "vit" else "flops_per_token"
    return {
        "schema": SCHEMA,
        "recipe": config.recipe,
        "size": config.size,
        "config": to_dict(config),
        "world_size": config.parallel.world_size,
        "global_batch_size": config.global_batch_size,
        "num_parameters": count_parameters(config.model),
        "versions": describe_versions(config.parallel.accelerator),
        per_unit: count_flops(config),
        "summary": render_summary(summarise(_on_meta(config))),
    }


def record_failure(
    config: RunConfig, failure: RankFailure, path: Path, *, command: str, since_s: float
) -> None:
    """Write whose failure ended a run: into the first rank's record, or one of its own.

    Args:
        since_s: clock time at which the ranks were started; an older record is another's.
    """
    if not amend_record(path, failure, since_s=since_s):
        write_record(_empty_record(config, command) | describe_failure(failure), path)


def _empty_record(config: RunConfig, command: str) -> Record:
    """Of a run that could tell nothing itself."""
    nothing: Record = {key: [] for key in ("launches", "loss", "learning_rate", "gradient_norm")}
    return {
        **nothing,
        **_describe(config),
        "status": "crashed",
        "command": command,
        "started_at": None,
        "code": describe_code(),
        "hardware": [describe_host()],
        "data": {},
        "step_s": [],
        "samples": {name: [] for name in (*SAMPLES, *OPTIONAL_SAMPLES)},
        "samples_untold": {},
        "unsteady": [],
        "figures": {},
        "flags": [],
        "steady_method": None,
        "steady_reason": None,
        "steady_from": None,
        "peak_bytes": [],
        "validation": {},
        "log": [],
        "error": None,
    }


def _on_meta(config: RunConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config.model)


def _validation(config: RunConfig, data: DataModule, history: History) -> dict[str, Any]:
    last = history.validation[-1]
    baseline = data.baseline()
    return {
        "history": history.validation,
        "loss": last["val_loss"],
        "metric": METRIC[config.recipe],
        "value": metric_value(config.recipe, loss=last["val_loss"], accuracy=last["val_accuracy"]),
        "baseline": None if baseline is None else asdict(baseline),
    }


def _status(error: BaseException | None) -> Status:
    match error:
        case None:
            return "ok"
        case torch.OutOfMemoryError() | MemoryError():
            return "oom"
        case Stopped() | KeyboardInterrupt() | SystemExit():
            return "preempted"
        case _:
            return "crashed"


def _describe_error(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error)[:2000],
        "rank": process_rank(),
        "last_lines": "".join(traceback.format_exception(error)).splitlines()[-20:],
        "errno": find_errno(error),
    }
