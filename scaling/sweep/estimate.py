"""Estimates the time, memory, device-hours and cost of a sweep before it runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaling.sweep.plan import CellTask, train_flops
from unitransformer.config import RunConfig
from unitransformer.costs.gpus import MATMUL_DTYPE
from unitransformer.costs.memory import rank_bytes
from unitransformer.machine.calibration import Calibration
from unitransformer.machine.calibration_store import load_calibration
from unitransformer.record.units import format_bytes, format_count, format_duration

# Fitted to the 168 cells of a sweep of the study `quick` on two cores, and to runs of the reference
# sizes there. CPU_START_S is the median over the cells of the time outside their steps. A step
# takes CPU_OVERHEAD times the square root of its ideal time longer than that ideal, the time of its
# matrix products at the ceiling: 32 ms more at 4 ms, 0.5 s more at 1 s. Six of seven cells took
# between half and twice the estimate, as did steps of every reference size; a larger factor
# overestimates the cells, a smaller one underestimates the reference steps.
CPU_START_S = 3.6
CPU_OVERHEAD = 0.5  # square roots of a second


@dataclass(frozen=True, kw_only=True)
class CellEstimate:
    """The estimate of one task."""

    least_s: float | None  # lower bound; None: `reason` says why it is unknown
    likely_s: float | None = None  # including start-up; None: unknown
    reason: str | None = None
    memory_bytes: int | None = None  # of one rank, by formula; None: refused
    devices: int = 0


def estimate_cell(task: CellTask, calibrations: Mapping[str, Calibration | None]) -> CellEstimate:
    """Estimates a task; `calibrations` are by kind of device, "cpu" or "cuda"."""
    config = task.config
    if config is None:
        return CellEstimate(least_s=0.0, likely_s=0.0)
    rate, reason = _flops_per_s(config, calibrations.get(config.parallel.accelerator))
    least_s = None if rate is None else train_flops(config) / rate
    likely_s = None
    if least_s is not None and config.parallel.accelerator == "cpu":
        step_s = least_s / config.max_steps
        likely_s = CPU_START_S + config.max_steps * (step_s + CPU_OVERHEAD * math.sqrt(step_s))
    return CellEstimate(
        least_s=least_s,
        likely_s=likely_s,
        reason=reason,
        memory_bytes=rank_bytes(config),
        devices=config.parallel.world_size,
    )


def _flops_per_s(
    config: RunConfig, calibration: Calibration | None
) -> tuple[float | None, str | None]:
    """Returns the ceiling of all devices of a run together, or why it is unknown."""
    if calibration is None:
        return None, (
            "this machine has no calibration (run `python -m scaling calibrate` first, or plan for "
            "other nodes with --hardware)"
        )
    try:
        ceiling = calibration.matmul_flops_per_s(MATMUL_DTYPE[config.parallel.precision])
    except ValueError as error:
        return None, str(error)
    is_shared = config.parallel.accelerator == "cpu"  # CPU ranks share the cores
    return ceiling * (calibration.num_ranks if is_shared else config.parallel.world_size), None


def load_calibrations(fingerprint: str) -> dict[str, Calibration | None]:
    """Loads a machine's newest ones by kind of device; raises ValueError for a damaged file."""
    return {
        # One rank alone uses all cores, as several together do.
        "cpu": load_calibration(fingerprint, device="cpu", num_ranks=1)
        or load_calibration(fingerprint, device="cpu"),
        "cuda": load_calibration(fingerprint, device="cuda"),
    }


def render_plan(
    tasks: Sequence[CellTask],
    calibrations: Mapping[str, Calibration | None],
    *,
    price_per_hour: float | None,
) -> str:
    """Returns a text with the totals, and every task with its command and its estimate."""
    estimates = [estimate_cell(task, calibrations) for task in tasks]
    num_refused = sum(task.config is None for task in tasks)
    refused = f", {num_refused} of them refused" if num_refused else ""
    lines = [
        f"{format_count(len(tasks), 'cell')}{refused}",
        *_totals(estimates, price_per_hour),
        "",
    ]
    for task, estimate in zip(tasks, estimates, strict=True):
        lines += [f"{task.name}  {task.cell.command}", f"    {_format(task, estimate)}"]
    return "\n".join(lines)


def _format(task: CellTask, estimate: CellEstimate) -> str:
    if estimate.memory_bytes is None:
        return f"refused: {task.refusal}"
    if estimate.least_s is None:
        time = "no time estimate"
    else:
        time = f"at least {format_duration(estimate.least_s)}"
        if estimate.likely_s is not None:
            time = f"about {format_duration(estimate.likely_s)}, {time}"
    ranks = format_count(estimate.devices, "rank")
    return f"{time}; {ranks}, about {format_bytes(estimate.memory_bytes)} per rank"


def _totals(estimates: Sequence[CellEstimate], price_per_hour: float | None) -> list[str]:
    reasons = {estimate.reason for estimate in estimates if estimate.reason}
    if reasons:
        return [f"no time estimate: {reason}" for reason in sorted(reasons)]
    least_s = sum(estimate.least_s or 0.0 for estimate in estimates)
    lower_bound = f"at least {format_duration(least_s)}: matrix products at this machine's ceiling"
    if all(estimate.likely_s is not None for estimate in estimates):
        likely_s = sum(estimate.likely_s or 0.0 for estimate in estimates)
        lines = [
            f"about {format_duration(likely_s)}: {CPU_START_S} s of start-up per cell, and an "
            "overhead of each step as measured on a machine with two cores",
            lower_bound,
        ]
        kind, used_s = "about", [(e.likely_s or 0.0) * e.devices for e in estimates]
    else:
        lines = [f"{lower_bound}, without start-up and overhead, which are unknown on GPUs"]
        kind, used_s = "at least", [(e.least_s or 0.0) * e.devices for e in estimates]
    hours = sum(used_s) / 3600
    cost = "" if price_per_hour is None else f", cost {hours * price_per_hour:,.2f}"
    return [*lines, f"{kind} {hours:,.3g} device-hours{cost}"]
