"""Keeps the loss and the times of every optimizer step, over all segments and ranks of a run.

A segment is the part of a run between a start and the next resumption.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch

from unitransformer.measure.clock import StepClock, StepTimes
from unitransformer.record.migration import NAMES
from unitransformer.record.schema import OPTIONAL_SAMPLES
from unitransformer.training.module import TrainingModule

DIVERGED_FIX = "lower optimizer.learning-rate and start again"
T = TypeVar("T")


@dataclass(kw_only=True)
class History:
    """One number per optimizer step since the first; it is stored in every checkpoint."""

    loss: list[float] = field(default_factory=list)  # mean over ranks and micro-batches
    gradient_norm: list[float] = field(default_factory=list)  # before clipping; empty without
    # Of the slowest rank at each step: the others waited for it.
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    data_s: list[float] = field(default_factory=list)
    forward_backward_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    communication_s: list[float | None] = field(default_factory=list)  # None: not measured
    # The minimum over the ranks: on the others it includes waiting for slower ranks.
    min_communication_s: list[float | None] = field(default_factory=list)
    between_steps_s: list[float | None] = field(default_factory=list)
    slowest_rank: list[int] = field(default_factory=list)
    segment_starts: list[int] = field(default_factory=list)  # first step of each segment
    validation: list[dict[str, float]] = field(default_factory=list)
    sha256: str | None = None  # of the data

    @property
    def num_steps(self) -> int:
        return len(self.step_s)

    def truncate(self, num_steps: int) -> None:
        for name in PER_STEP_FIELDS:
            del getattr(self, name)[num_steps:]


def read_history(run_state: Mapping[str, Any]) -> History:
    """Returns the history in the run state of a checkpoint, which has other fields too."""
    names = {item.name for item in fields(History)}
    # Checkpoints of older versions lack some samples and have older names.
    num_steps = len(run_state.get("step_s", ()))
    values: dict[str, Any] = {name: [None] * num_steps for name in OPTIONAL_SAMPLES}
    values |= {NAMES.get(name, name): value for name, value in run_state.items()}
    return History(**{name: value for name, value in values.items() if name in names})


CLOCK_FIELDS = tuple(item.name for item in fields(StepTimes))
PER_STEP_FIELDS = ("loss", "gradient_norm", *CLOCK_FIELDS, "min_communication_s", "slowest_rank")


@dataclass(frozen=True, kw_only=True)
class RankSteps:
    """The steps of one rank in this segment."""

    loss: list[float]
    steps: list[StepTimes]
    gradient_norm: list[float]


class ClockError(RuntimeError):
    """Impossible times, from which nothing may be derived."""


def current_history(
    before: History, module: TrainingModule, clock: StepClock, *, all_ranks: bool
) -> History:
    """Returns `before` and this segment.

    Args:
        all_ranks: merge the steps of all ranks, all of which call this and get the same history;
            otherwise only this rank's steps are used.

    Raises:
        ClockError: the ranks disagree on the number of steps.
    """
    try:
        here = RankSteps(
            loss=module.losses().tolist(),
            steps=clock.steps(),
            gradient_norm=module.gradient_norms().tolist(),
        )
    except RuntimeError:
        if all_ranks:
            raise
        here = RankSteps(loss=[], steps=[], gradient_norm=[])  # the device has failed
    ranks = gather(here, module) if all_ranks else [here]
    return append_segment(before, ranks, module.validation)


def append_segment(
    before: History, ranks: Sequence[RankSteps], validation: list[dict[str, float]]
) -> History:
    """Returns `before` and the steps that all ranks measured since.

    Raises:
        ClockError: the ranks disagree on the number of steps.
    """
    # A step that failed after its loss has no time.
    counts = [min(len(rank.loss), len(rank.steps)) for rank in ranks]
    if len(set(counts)) > 1:
        listed = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(counts))
        raise ClockError(f"the ranks disagree on the number of steps ({listed})")
    steps = range(counts[0])
    slowest = [max(range(len(ranks)), key=lambda rank: ranks[rank].steps[i].step_s) for i in steps]
    samples = [asdict(ranks[rank].steps[i]) for i, rank in enumerate(slowest)]
    return History(
        loss=before.loss + [math.fsum(r.loss[i] for r in ranks) / len(ranks) for i in steps],
        gradient_norm=before.gradient_norm + ranks[0].gradient_norm[: counts[0]],
        min_communication_s=before.min_communication_s
        + [_minimum([rank.steps[i].communication_s for rank in ranks]) for i in steps],
        slowest_rank=before.slowest_rank + slowest,
        segment_starts=[*before.segment_starts, before.num_steps],
        validation=validation,
        sha256=before.sha256,
        **{name: getattr(before, name) + [step[name] for step in samples] for name in CLOCK_FIELDS},
    )


def _minimum(times_s: Sequence[float | None]) -> float | None:
    """Returns the minimum over all ranks, or None if one of them did not measure it."""
    measured = [time_s for time_s in times_s if time_s is not None]
    return min(measured) if len(measured) == len(times_s) else None


def find_fault(history: History) -> Exception | None:
    """Returns the error of the first impossible step, and truncates `history` before that step."""
    for step, (loss, step_s) in enumerate(zip(history.loss, history.step_s, strict=True)):
        if not math.isfinite(loss):
            history.truncate(step)
            return FloatingPointError(f"loss is {loss} at step {step + 1}; {DIVERGED_FIX}")
        for name in (*CLOCK_FIELDS, "min_communication_s"):
            seconds = getattr(history, name)[step]
            if seconds is not None and not (0 <= seconds < math.inf and step_s > 0):
                history.truncate(step)
                return ClockError(f"step {step + 1} has {name} {seconds}: the clock went backwards")
    for point in history.validation:
        loss, step = point["val_loss"], int(point["step"])
        if not math.isfinite(loss):
            history.validation = [other for other in history.validation if other["step"] < step]
            return FloatingPointError(
                f"validation loss is {loss} after step {step}; {DIVERGED_FIX}"
            )
    return None


def gather(value: T, module: TrainingModule) -> list[T]:
    """Returns the `value` of every rank; all ranks have to call this."""
    if module.trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * module.trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
