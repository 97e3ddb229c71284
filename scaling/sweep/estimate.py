"""What a sweep will take, before it runs: seconds, bytes, device-hours, money."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaling.sweep.plan import CellTask, train_flops
from unitransformer.config import RunConfig
from unitransformer.costs.memory import rank_bytes
from unitransformer.costs.peaks import MATMUL_DTYPE
from unitransformer.machine.calibration import Calibration
from unitransformer.machine.calibration_store import load_calibration
from unitransformer.record.units import count, duration, gib

# Of CPU runs, found in those of `scaling/results`: in the median of 168 cells all but the steps;
# and what a step takes beside its matrix products at the ceiling, over the square root of those: 32
# ms beside 4 ms, 0.5 s beside 1 s. Six of seven cells took between half and twice that, and so did
# steps of every reference size, of which more would be too much for the cells and less too little.
CPU_START_S = 3.6
CPU_BESIDE = 0.5  # square roots of a second


@dataclass(frozen=True, kw_only=True)
class CellEstimate:
    """Of one task."""

    seconds: float | None  # at least; None: no ceiling is known, `reason` says why
    likely_s: float | None  # with its start-up; None: nothing is known of such runs
    reason: str | None
    memory_bytes: int | None  # of one rank: states and activations by formula; None: refused
    devices: int


def estimate_cell(task: CellTask, calibrations: Mapping[str, Calibration | None]) -> CellEstimate:
    """Matrix products over the rate that this machine has reached: no training is faster.

    Args:
        calibrations: by kind of device, "cpu" or "cuda".
    """
    config = task.config
    if config is None:
        return CellEstimate(seconds=0.0, likely_s=0.0, reason=None, memory_bytes=None, devices=0)
    rate, reason = _rate(config, calibrations.get(config.parallel.accelerator))
    seconds = None if rate is None else train_flops(config) / rate
    return CellEstimate(
        seconds=seconds,
        likely_s=None if seconds is None else _likely_s(config, seconds),
        reason=reason,
        memory_bytes=rank_bytes(config),
        devices=config.parallel.world_size,
    )


def _likely_s(config: RunConfig, seconds: float) -> float | None:
    if config.parallel.accelerator != "cpu":
        return None
    ideal_s = seconds / config.max_steps
    return CPU_START_S + config.max_steps * (ideal_s + CPU_BESIDE * math.sqrt(ideal_s))


def _rate(config: RunConfig, calibration: Calibration | None) -> tuple[float | None, str | None]:
    """FLOP/s of all devices of a run together."""
    if calibration is None:
        return None, "this machine has no calibration; run python -m scaling calibrate"
    try:
        ceiling = calibration.matmul_flops_per_s(MATMUL_DTYPE[config.parallel.precision])
    except ValueError as error:
        return None, str(error)
    if config.parallel.accelerator == "cpu":  # its ranks share the cores
        return ceiling * calibration.num_ranks, None
    return ceiling * config.parallel.world_size, None


def load_calibrations(fingerprint: str) -> dict[str, Calibration | None]:
    """The newest of a machine, by kind of device; raises ValueError if one is damaged."""
    return {
        "cpu": load_calibration(fingerprint, device="cpu", num_ranks=1),
        "cuda": load_calibration(fingerprint, device="cuda"),
    }


def render_plan(
    tasks: Sequence[CellTask],
    calibrations: Mapping[str, Calibration | None],
    *,
    price_per_hour: float | None,
) -> str:
    """Every task with its command, and what they come to.

    Args:
        calibrations: by kind of device, "cpu" or "cuda".
    """
    estimates = [estimate_cell(task, calibrations) for task in tasks]
    lines = []
    for task, told in zip(tasks, estimates, strict=True):
        lines += [f"{task.name}  {task.cell.command}", f"    {_in_words(task, told)}"]
    return "\n".join([*lines, "", *_totals(tasks, estimates, price_per_hour)])


def _in_words(task: CellTask, told: CellEstimate) -> str:
    if task.config is None:
        return f"refused: {task.refusal}"
    assert told.memory_bytes is not None
    ranks = count(task.config.parallel.world_size, "rank")
    return f"{_time(told)}, about {gib(told.memory_bytes)} a rank, {ranks}"


def _time(told: CellEstimate) -> str:
    if told.seconds is None:
        return "time not told"
    likely = "" if told.likely_s is None else f", about {duration(told.likely_s)}"
    return f"at least {duration(told.seconds)}{likely}"


def _totals(
    tasks: Sequence[CellTask], estimates: Sequence[CellEstimate], price_per_hour: float | None
) -> list[str]:
    refused = sum(task.config is None for task in tasks)
    also = f", {refused} of them refused" if refused else ""
    lines = [f"{count(len(tasks), 'cell')}{also}"]
    untold = {told.reason for told in estimates if told.reason}
    if untold:
        return [*lines, *(f"time not told: {reason}" for reason in sorted(untold))]
    least_s = sum(told.seconds or 0.0 for told in estimates)
    lines.append(f"at least {duration(least_s)}: the matrix products at this machine's ceiling")
    if all(told.likely_s is not None for told in estimates):
        likely_s = sum(told.likely_s or 0.0 for told in estimates)
        lines.append(
            f"about {duration(likely_s)}: {CPU_START_S} s to start each cell, and steps as much "
            "above their ceiling as those of the CPU runs in scaling/results"
        )
    else:
        lines.append("start-up of each cell not counted: nothing is known of it on GPUs")
    return [*lines, _cost(estimates, price_per_hour)]


def _cost(estimates: Sequence[CellEstimate], price_per_hour: float | None) -> str:
    """By the likely time where it is known of every cell, else by the least."""
    is_likely = all(told.likely_s is not None for told in estimates)
    hours = 0.0
    for told in estimates:
        hours += ((told.likely_s if is_likely else told.seconds) or 0.0) * told.devices / 3600
    money = "" if price_per_hour is None else f", {hours * price_per_hour:,.2f} of money"
    return f"{'about' if is_likely else 'at least'} {hours:,.3g} device-hours{money}"
