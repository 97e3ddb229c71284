"""Times every optimizer step of a rank and its parts: data, forward and backward, optimizer, waits.

Validation is excluded; other time between two steps is recorded apart from them. On a CPU the clock
reads monotonic time and the processor time of all threads. On a GPU it records CUDA events and
reads them later, so that it synchronizes no step. In 16-mixed the loss scaler does, which reads
whether a gradient overflowed, and with DeepSpeed its step, which reads the gradient norm.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch

StepPart = Literal["data", "forward_backward", "optimizer", "communication"]
# Host-bound: the processor works for this share of a median step or more, and in most steps the GPU
# is not behind. Neither is enough: a processor also works, at 100 %, while it waits for room in the
# GPU's queue of some 1,000 kernels, and a GPU that waits for data is not behind either.
HOST_BOUND_SHARE = 0.9
MIN_STEPS = 10  # for a verdict
HOST_BOUND = (
    "host-bound: the processor takes as long to launch a step as the step takes, and the GPU waits "
    "for it; use a larger batch or model, or --compile, before you compare GPUs"
)
# The part that ends at this time; None: the time up to here belongs to the part that ends next.
Mark = tuple[StepPart | None, Any]


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One optimizer step of this rank; its parts, from `data_s` on, add up to `step_s`."""

    step_s: float
    cpu_s: float  # processor time of the process, summed over its threads
    data_s: float  # waiting for batches, and copying them to the device
    forward_backward_s: float  # includes communication that overlaps with it
    optimizer_s: float  # includes clipping
    communication_s: float | None = None  # exposed; None: not measured, within the other parts
    between_steps_s: float | None = None  # since the last step, no validation; None: first step


class StepClock:
    """Times every optimizer step of this rank, from `start` to `stop`."""

    def __init__(
        self,
        *,
        on_gpu: bool = False,
        measures_communication: bool = True,
        host_runs_ahead: bool = True,
    ) -> None:
        self._on_gpu = on_gpu
        self._host_runs_ahead = on_gpu and host_runs_ahead  # no step waits for the GPU
        self._up_to_date: list[bool] = []  # per step: whether the GPU was not behind
        self._measures_communication = measures_communication  # `begin_wait` is called
        self._unread: list[tuple[list[Mark], float, Any]] = []
        self._steps: list[StepTimes] = []
        self._marks: list[Mark] = []  # of the current step
        self._wait_depth = 0
        self._last_end: Any = None
        self._between: tuple[Any, Any] | None = None  # end of the last step, start of what followed
        self._cpu_start_s = 0.0

    def start(self, *, again: bool = False) -> None:
        """Starts the next step; `again` restarts a step that has started already."""
        if self._marks and not again:
            return
        self._cpu_start_s = time.process_time()
        now = self._now()
        if not self._marks and self._last_end is not None:
            self._between = (self._last_end, now)
        self._marks = [(None, now)]

    def mark(self, part: StepPart) -> None:
        """Assigns the time since the last mark to `part`."""
        self._marks.append((part, self._now()))

    def begin_wait(self) -> None:
        """Begins a wait for other ranks; ignored between steps."""
        self._wait_depth += 1
        if self._marks and self._wait_depth == 1:
            self._marks.append((None, self._now()))

    def end_wait(self) -> None:
        """Assigns the time since `begin_wait` to communication."""
        self._wait_depth -= 1
        if self._marks and self._wait_depth == 0:
            self.mark("communication")

    def stop(self) -> None:
        """Ends the step, whose last part is the optimizer."""
        self.mark("optimizer")
        self._unread.append((self._marks, time.process_time() - self._cpu_start_s, self._between))
        if self._host_runs_ahead:
            ends = [event for part, event in self._marks if part == "forward_backward"]
            self._up_to_date += [event.query() for event in ends[-1:]]
        self._last_end = self._marks[-1][1]
        self._marks, self._between = [], None

    def steps(self) -> list[StepTimes]:
        """Returns the times of every step; waits for the device."""
        if self._on_gpu and self._unread:
            self._unread[-1][0][-1][1].synchronize()
        for marks, cpu_s, between in self._unread:
            between_s = None if between is None else self._seconds(*between)
            self._steps.append(self._measure(marks, cpu_s, between_s))
        self._unread.clear()
        return list(self._steps)

    def flags(self) -> list[str]:
        """Returns that the steps are host-bound, if they are; waits for the device.

        The GPU is not behind if it has done the backward pass when the optimizer has been launched.
        """
        num_steps, num_up_to_date = len(self._up_to_date), sum(self._up_to_date)
        if num_steps < MIN_STEPS or 2 * num_up_to_date <= num_steps:
            return []
        share = statistics.median(step.cpu_s / step.step_s for step in self.steps())
        return [HOST_BOUND] if share >= HOST_BOUND_SHARE else []

    def step_s(self) -> list[float]:
        """Returns the seconds of every step; waits for the device."""
        return [step.step_s for step in self.steps()]

    def _measure(
        self, marks: Sequence[Mark], cpu_s: float, between_steps_s: float | None
    ) -> StepTimes:
        parts_s: dict[StepPart, float] = dict.fromkeys(get_args(StepPart), 0.0)
        pending_s = 0.0  # belongs to the part that ends next
        for (_, start), (part, end) in itertools.pairwise(marks):
            seconds = self._seconds(start, end)
            if part is None:
                pending_s += seconds
            elif part == "communication":
                parts_s[part] += seconds
            else:
                parts_s[part] += pending_s + seconds
                pending_s = 0.0
        return StepTimes(
            step_s=self._seconds(marks[0][1], marks[-1][1]),
            cpu_s=cpu_s,
            data_s=parts_s["data"],
            forward_backward_s=parts_s["forward_backward"],
            optimizer_s=parts_s["optimizer"],
            communication_s=parts_s["communication"] if self._measures_communication else None,
            between_steps_s=between_steps_s,
        )

    def _seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1000 if self._on_gpu else end - start)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class StopClock(pl.Callback):
    """Ends a step on the clock. The first callback, so that the others' time does not count."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self._last_step = 0
        self._has_gradients = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock.mark("data")
        self._has_gradients = False

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.clock.mark("forward_backward")
        self._has_gradients = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            self.clock.stop()
        else:  # a micro-batch; DeepSpeed calls the optimizer after each of them
            self.clock.mark("optimizer" if self._has_gradients else "forward_backward")


class StartClock(pl.Callback):
    """Starts a step on the clock. The last callback, so that the others' time does not count.

    If a rank does more than the others after a step (`needs_barrier`), these wait for it before.
    """

    def __init__(self, clock: StepClock, needs_barrier: Callable[[int], bool]) -> None:
        self.clock, self.needs_barrier = clock, needs_barrier
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._last_step = trainer.global_step
        trainer.strategy.barrier()
        self.clock.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step > self._last_step and self.needs_barrier(step):
            trainer.strategy.barrier()
        self._last_step = step
        self.clock.start()

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.training or trainer.validating:
            trainer.strategy.barrier()
            self.clock.start(again=True)
