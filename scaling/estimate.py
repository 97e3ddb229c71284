"""What a sweep will take, before it runs: seconds, bytes, device-hours, money."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaling.markdown import count, duration, gib
from scaling.order import train_flops
from scaling.tasks import Task
from unitransformer.calibrating.calibration import Calibration
from unitransformer.calibrating.store import load_calibration
from unitransformer.config import Precision, RunConfig
from unitransformer.memory import rank_bytes

DTYPE: dict[Precision, str] = {
    "32-true": "float32",
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one task."""

    seconds: float | None  # at least; None: no ceiling is known, `reason` says why
    reason: str | None
    memory_bytes: int | None  # of one rank: states and activations by formula; None: refused
    devices: int


def estimate(task: Task, calibrations: Mapping[str, Calibration | None]) -> Estimate:
    """Matrix products over the rate that this machine has reached: no training is faster.

    Args:
        calibrations: by kind of device, "cpu" or "cuda".
    """
    config = task.config
    if config is None:
        return Estimate(seconds=0.0, reason=None, memory_bytes=None, devices=0)
    rate, reason = _rate(config, calibrations.get(config.parallel.accelerator))
    return Estimate(
        seconds=None if rate is None else train_flops(config) / rate,
        reason=reason,
        memory_bytes=rank_bytes(config),
        devices=config.parallel.world_size,
    )


def _rate(config: RunConfig, calibration: Calibration | None) -> tuple[float | None, str | None]:
    """FLOP/s of all devices of a run together."""
    if calibration is None:
        return None, "this machine has no calibration; run python -m scaling calibrate"
    try:
        ceiling = calibration.matmul_flops_per_s(DTYPE[config.parallel.precision])
    except ValueError as error:
        return None, str(error)
    if config.parallel.accelerator == "cpu":  # its ranks share the cores
        return ceiling * calibration.num_ranks, None
    return ceiling * config.parallel.world_size, None


def calibrations_of(fingerprint: str) -> dict[str, Calibration | None]:
    """The newest of a machine, by kind of device; raises ValueError if one is damaged."""
    return {
        "cpu": load_calibration(fingerprint, device="cpu", num_ranks=1),
        "cuda": load_calibration(fingerprint, device="cuda"),
    }


def render_plan(
    tasks: Sequence[Task],
    calibrations: Mapping[str, Calibration | None],
    *,
    price_per_hour: float | None,
) -> str:
    """Every task with its command, and what they come to.

    Args:
        calibrations: by kind of device, "cpu" or "cuda".
    """
    estimates = [estimate(task, calibrations) for task in tasks]
    lines = []
    for task, told in zip(tasks, estimates, strict=True):
        lines += [f"{task.name}  {task.cell.command}", f"    {_in_words(task, told)}"]
    return "\n".join([*lines, "", *_totals(tasks, estimates, price_per_hour)])


def _in_words(task: Task, told: Estimate) -> str:
    if task.config is None:
        return f"refused: {task.refusal}"
    assert told.memory_bytes is not None
    time = f"at least {duration(told.seconds)}" if told.seconds is not None else "time not told"
    ranks = count(task.config.parallel.world_size, "rank")
    return f"{time}, about {gib(told.memory_bytes)} a rank, {ranks}"


def _totals(
    tasks: Sequence[Task], estimates: Sequence[Estimate], price_per_hour: float | None
) -> list[str]:
    refused = sum(task.config is None for task in tasks)
    also = f", {refused} of them refused" if refused else ""
    lines = [f"{count(len(tasks), 'cell')}{also}"]
    untold = {told.reason for told in estimates if told.reason}
    if untold:
        return [*lines, *(f"time not told: {reason}" for reason in sorted(untold))]
    seconds = sum(told.seconds or 0.0 for told in estimates)
    hours = sum((told.seconds or 0.0) * told.devices for told in estimates) / 3600
    money = "" if price_per_hour is None else f", {hours * price_per_hour:,.2f} of money"
    return [
        *lines,
        f"at least {duration(seconds)}, start-up of each cell not counted; "
        f"{hours:,.3g} device-hours{money}",
    ]
