"""Builds the run record from the history and the instrument readings."""

import math
import os
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
from unitransformer.launch.failures import RankFailure, amend_record, describe_failure, failure_of
from unitransformer.machine.host import describe_host
from unitransformer.machine.software import describe_code, describe_versions
from unitransformer.measure.communication import why_communication_missing
from unitransformer.measure.host_load import HostLoad, load_between
from unitransformer.measure.nvml import energy_between_samples
from unitransformer.record.metrics import (
    StepMetrics,
    compute_metrics,
    compute_mfu,
    find_last_steady_state,
)
from unitransformer.record.parameter_summary import render_summary, summarize
from unitransformer.record.schema import (
    OPTIONAL_SAMPLES,
    SAMPLES,
    SCHEMA,
    Record,
    write_record,
)
from unitransformer.record.units import METRIC, UNIT, metric_value
from unitransformer.training.history import History
from unitransformer.transformer import Transformer

MAX_LOG_LINES = 40
# Fields of the record that hold one instrument reading per rank.
READINGS: tuple[str, ...] = ("hardware", "gpu", "ceiling", "compile", "recomputed_layers", "trace")
READINGS += (
    "network",
    "loss_blocks",
    "peak_bytes",
    "peak_reserved_bytes",
    "peak_resident_bytes",
    "tensor_bytes",
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
    """Returns the record of a run that ended or failed.

    Args:
        readings: `Instruments.reading` of each rank, or of this rank alone after a failure.
    """
    samples = {name: getattr(history, name) for name in (*SAMPLES, *OPTIONAL_SAMPLES)}
    communication_missing = why_communication_missing(config.parallel, config.parallel.accelerator)
    excluded = _excluded_steps(readings, history)
    steady = find_last_steady_state(
        history.step_s,
        segment_starts=history.segment_starts,
        excluded_steps=[item["step"] for item in excluded],
    )
    metrics = compute_metrics(
        history.step_s,
        samples,
        steady,
        segment_starts=history.segment_starts,
        units_per_step=config.global_batch_size * config.tokens_per_sample,
    )
    units_per_s = None if metrics is None else metrics.units_per_s
    by_rank = {name: [reading[name] for reading in readings] for name in READINGS}
    first = history.segment_starts[-1]
    steady_steps = [first + step for step in steady.steps(len(history.step_s[first:]))]
    by_rank["gpu"] = [_with_energy(gpu, steady_steps) for gpu in by_rank["gpu"]]
    loads = _host_loads(readings)
    mfu = compute_mfu(config, units_per_s, by_rank["hardware"], by_rank["ceiling"])
    steady_from = None if steady.start is None else first + steady.start
    failure: Record = {"status": "ok", "error": None}
    if error is not None:
        failure = describe_failure(failure_of(error, rank=process_rank()))
    return {
        **_describe(config),
        "data": {"description": data.source.description, "sha256": data.source.sha256},
        "segment_starts": history.segment_starts,
        "loss": history.loss,
        "learning_rate": [
            config.optimizer.learning_rate_at(step) for step in range(history.num_steps)
        ],
        # None: the gradients overflowed in float16, and the step was skipped.
        "gradient_norm": [n if math.isfinite(n) else None for n in history.gradient_norm],
        "step_s": history.step_s,
        "samples": samples,
        "samples_missing": (
            {} if communication_missing is None else {"communication_s": communication_missing}
        ),
        "excluded_steps": excluded,
        "steady_from": steady_from,
        "steady_method": steady.method,
        "no_steady_state_reason": steady.reason,
        "metrics": {} if metrics is None else metrics.as_dict(),
        f"{UNIT[config.recipe]}_per_s": units_per_s,
        "mfu": [asdict(row) for row in mfu],
        "flags": [
            *_flags(readings, loads, mfu),
            *_recompilations(by_rank["compile"], steady_from),
            *_wide_interval(config, metrics),
        ],
        "host_load": [load.as_dict() for load in loads],
        **by_rank,
        "peak_bytes_kind": PEAK_KIND[config.parallel.accelerator],
        "validation": _validation(config, data, history) if error is None else {},
        "log": lines[-MAX_LOG_LINES:],
        **failure,
    }


def _excluded_steps(
    readings: Sequence[Mapping[str, Any]], history: History
) -> list[dict[str, Any]]:
    """Returns the steps in which a rank compiled or measured something else, with the reason."""
    reasons: dict[int, str] = {}
    for reading in readings:
        reasons |= {int(step): reason for step, reason in reading["excluded_steps"].items()}
    steps = sorted(step for step in reasons if step < history.num_steps)
    return [{"step": step, "reason": reasons[step]} for step in steps]


def _with_energy(gpu: Mapping[str, Any], steps: Collection[int]) -> dict[str, Any]:
    """Adds the energy of the steady steps to the readings of a GPU."""
    energy = energy_between_samples(gpu["samples"], set(steps))
    reason = {} if energy.reason is None else {"joules": energy.reason}
    return {**gpu, **energy.as_dict(), "missing": reason | gpu["missing"]}


def _host_loads(readings: Sequence[Mapping[str, Any]]) -> list[HostLoad]:
    """Returns the load of each machine by other processes, if its ranks finished training."""
    machines: dict[str, list[Mapping[str, Any]]] = {}
    for reading in readings:
        if reading["host"] is not None:
            machines.setdefault(reading["hardware"]["hostname"], []).append(reading)
    return [
        load_between(*zip(*(rank["host"] for rank in ranks), strict=True), num_cores=cores)
        for ranks in machines.values()
        if (cores := os.cpu_count())
    ]


def _recompilations(ledgers: Sequence[Mapping[str, Any]], steady_from: int | None) -> list[str]:
    """Returns a flag for each timed step in which a rank compiled."""
    first = math.inf if steady_from is None else steady_from
    steps = {step for ledger in ledgers for step in ledger["steps"] if step >= first}
    return [f"recompiled at step {step + 1}, one of the timed steps" for step in sorted(steps)]


def _wide_interval(config: RunConfig, metrics: StepMetrics | None) -> list[str]:
    """Returns a flag if the interval is wider than `until_interval`."""
    target = config.until_interval
    width = None if metrics is None else metrics.step.relative_width
    if target is None or (width is not None and width <= target):
        return []
    width_text = "unknown" if width is None else f"{width:.1%}"
    return [f"the width of the interval is {width_text}; until_interval is {target:.1%}"]


def _flags(
    readings: Sequence[Mapping[str, Any]], loads: Sequence[HostLoad], mfu: Sequence[MfuRow]
) -> list[str]:
    """Returns what makes the measurements doubtful, each reason once with the ranks that saw it."""
    ranks: dict[str, list[int]] = {}
    for rank, reading in enumerate(readings):
        for flag in reading["flags"]:
            ranks.setdefault(flag, []).append(rank)
    flags = [
        flag if len(readings) == 1 else f"{flag} (rank {', '.join(map(str, seen))})"
        for flag, seen in ranks.items()
    ]
    flags += [flag for load in loads for flag in load.flags()]
    return flags + [f"{row.convention}: {row.flag}" for row in mfu if row.flag]


def _describe(config: RunConfig) -> Record:
    """Returns the fields that are known before a run starts."""
    per_unit = "flops_per_image" if config.recipe == "vit" else "flops_per_token"
    with torch.device("meta"):
        network = Transformer(config.model)
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
        "summary": render_summary(summarize(network)),
    }


def record_failure(
    config: RunConfig, failure: RankFailure, path: Path, *, command: str, since_s: float
) -> None:
    """Writes the failure that ended a run into the record of rank 0, or into a new record.

    Args:
        since_s: clock time at which the ranks were started; an older record is of another run.
    """
    if not amend_record(path, failure, since_s=since_s):
        write_record(_empty_record(config, command) | describe_failure(failure), path)


def _empty_record(config: RunConfig, command: str) -> Record:
    """Returns the record of a run whose ranks wrote none."""
    series = ("loss", "learning_rate", "gradient_norm", "step_s", "segment_starts")
    lists = (*series, "excluded_steps", "flags", "peak_bytes", "log")
    groups = ("data", "samples_missing", "metrics", "validation")
    absent = ("started_at", "steady_method", "no_steady_state_reason", "steady_from", "error")
    return {
        **_describe(config),
        "status": "crashed",
        "command": command,
        "code": describe_code(),
        "hardware": [describe_host()],
        "samples": {name: [] for name in (*SAMPLES, *OPTIONAL_SAMPLES)},
        **{key: [] for key in lists},
        **{key: {} for key in groups},
        **dict.fromkeys(absent),
    }


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
