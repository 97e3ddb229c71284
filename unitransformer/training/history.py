"""What a run did so far, step by step, over every launch and every rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch

from unitransformer.measure.clock import Step, StepClock
from unitransformer.record.schema import OPTIONAL_SAMPLES
from unitransformer.training.module import TrainingModule

T = TypeVar("T")


@dataclass(kw_only=True)
class History:
    """One number an optimizer step, since the very first; travels inside the checkpoint."""

    loss: list[float] = field(default_factory=list)  # mean over ranks and micro-batches
    gradient_norm: list[float] = field(default_factory=list)  # before clipping; empty without
    # Of the rank that took longest at each step: the others waited for it.
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    data_s: list[float] = field(default_factory=list)
    forward_backward_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    communication_s: list[float | None] = field(default_factory=list)  # None: not told
    # Of the rank on which it was least: on the others it is also waiting for that rank.
    least_communication_s: list[float | None] = field(default_factory=list)
    between_s: list[float | None] = field(default_factory=list)
    slowest_rank: list[int] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)  # first step of each
    validation: list[dict[str, float]] = field(default_factory=list)
    sha256: str | None = None  # of the data

    @property
    def num_steps(self) -> int:
        return len(self.step_s)

    def cut(self, num_steps: int) -> None:
        """Forget the steps from `num_steps` on."""
        for name in PER_STEP:
            del getattr(self, name)[num_steps:]


def read_history(told: Mapping[str, Any]) -> History:
    """Of what a checkpoint tells, or nothing; it may tell more."""
    names = {item.name for item in fields(History)}
    # A version that did not look for something has left nothing of it in the checkpoint.
    untold = {name: [None] * len(told.get("step_s", ())) for name in OPTIONAL_SAMPLES}
    return History(**untold | {name: value for name, value in told.items() if name in names})


CLOCKED = tuple(item.name for item in fields(Step))
PER_STEP = ("loss", "gradient_norm", *CLOCKED, "least_communication_s", "slowest_rank")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank saw of this launch."""

    loss: list[float]
    steps: list[Step]
    gradient_norm: list[float]


class ClockError(RuntimeError):
    """Times that cannot be: nothing may be derived from them."""


def history_now(
    before: History, module: TrainingModule, clock: StepClock, *, is_whole: bool
) -> History:
    """Earlier launches and this one. A `is_whole` one is the same on every rank; without it this
    rank speaks for itself.

    Raises:
        ClockError: ranks that disagree on the number of steps.
    """
    try:
        own = Share(
            loss=module.losses().tolist(),
            steps=clock.steps(),
            gradient_norm=module.gradient_norms().tolist(),
        )
    except RuntimeError:
        if is_whole:
            raise
        own = Share(loss=[], steps=[], gradient_norm=[])  # the device that failed answers no more
    return extend(before, gather(own, module) if is_whole else [own], module.validation)


def extend(before: History, ranks: Sequence[Share], validation: list[dict[str, float]]) -> History:
    """`before` and what every rank saw since.

    Raises:
        ClockError: ranks that disagree on the number of steps.
    """
    # A step that broke after its loss has no time.
    counts = [min(len(rank.loss), len(rank.steps)) for rank in ranks]
    if len(set(counts)) > 1:
        told = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(counts))
        raise ClockError(f"the ranks disagree on the number of steps ({told})")
    steps = range(counts[0])
    slowest = [max(range(len(ranks)), key=lambda rank: ranks[rank].steps[i].step_s) for i in steps]
    samples = [asdict(ranks[rank].steps[i]) for i, rank in enumerate(slowest)]
    return History(
        loss=before.loss + [math.fsum(r.loss[i] for r in ranks) / len(ranks) for i in steps],
        gradient_norm=before.gradient_norm + ranks[0].gradient_norm[: counts[0]],
        least_communication_s=before.least_communication_s
        + [_least([rank.steps[i].communication_s for rank in ranks]) for i in steps],
        slowest_rank=before.slowest_rank + slowest,
        launches=[*before.launches, before.num_steps],
        validation=validation,
        sha256=before.sha256,
        **{name: getattr(before, name) + [step[name] for step in samples] for name in CLOCKED},
    )


def _least(told: Sequence[float | None]) -> float | None:
    seconds = [each for each in told if each is not None]
    return min(seconds) if len(seconds) == len(told) else None


def find_fault(history: History) -> Exception | None:
    """A step that cannot have been: `history` is cut before it."""
    for step, (loss, step_s) in enumerate(zip(history.loss, history.step_s, strict=True)):
        if not math.isfinite(loss):
            history.cut(step)
            return FloatingPointError(
                f"loss is {loss} at step {step + 1}; lower optimizer.learning_rate"
            )
        told = {name: getattr(history, name)[step] for name in (*CLOCKED, "least_communication_s")}
        for name, seconds in told.items():
            if seconds is not None and not (0 <= seconds < math.inf and step_s > 0):
                history.cut(step)
                return ClockError(f"step {step + 1} has {name} {seconds}: the clock went backwards")
    for point in history.validation:
        if not math.isfinite(point["val_loss"]):
            loss, step = point["val_loss"], int(point["step"])
            history.validation = [each for each in history.validation if each["step"] < step]
            return FloatingPointError(
                f"validation loss is {loss} after step {step}; lower optimizer.learning_rate"
            )
    return None


def gather(value: T, module: TrainingModule) -> list[T]:
    """`value` of every rank, on every rank; all of them have to call this."""
    if module.trainer.world_size == 1:
        return [value]
    everyone: list[Any] = [None] * module.trainer.world_size
    torch.distributed.all_gather_object(everyone, value)
    return everyone
