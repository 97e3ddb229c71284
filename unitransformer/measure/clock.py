"""The clock of a training run: seconds of every optimizer step and of its parts.

It sees data, forward, backward, optimizer, and where a rank stands and waits for others; validation
stands outside it, and what else lies between two steps is told apart. On a CPU it reads the
monotonic clock, and the processor time of all threads beside it. On a GPU it leaves CUDA events
behind, which are read when nobody is waiting: no step is ever synchronised.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch

Part = Literal["data", "forward_backward", "optimizer", "communication"]
PARTS: tuple[Part, ...] = Part.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of this rank; its parts, from `data_s` on, add up to `step_s`."""

    step_s: float
    cpu_s: float  # processor time of the process, all its threads together
    data_s: float  # waiting for batches, and bringing them to the device
    forward_backward_s: float  # communication that hides behind it included
    optimizer_s: float  # clipping included
    # Nothing else went on meanwhile. None: not told apart, and within the other parts.
    communication_s: float | None = None
    between_s: float | None = None  # since the step before, validation apart; None: the first one


class StepClock:
    """Samples of every optimizer step on this rank, from `start` to `stop`.

    Args:
        tells_communication: whether somebody calls `begin_wait` and `end_wait`.
    """

    def __init__(self, *, on_gpu: bool = False, tells_communication: bool = True) -> None:
        self._on_gpu = on_gpu
        self._tells_communication = tells_communication
        self._unread: list[tuple[list[tuple[Part | None, Any]], float, Any]] = []
        self._read: list[Step] = []
        # When each part ended, of this step; None: what ended is of the part that ends next.
        self._marks: list[tuple[Part | None, Any]] = []
        self._num_waits = 0  # that have begun, one within another
        self._last_end: Any = None
        self._between: tuple[Any, Any] | None = None  # the last end and what began behind it
        self._cpu_start_s = 0.0

    def start(self, *, again: bool = False) -> None:
        """The next step begins now; a step under way goes on unless it begins `again`."""
        if self._marks and not again:
            return
        self._cpu_start_s = time.process_time()
        now = self._now()
        if not self._marks and self._last_end is not None:
            self._between = (self._last_end, now)
        self._marks = [(None, now)]

    def mark(self, part: Part) -> None:
        """All since the last mark was `part`."""
        self._marks.append((part, self._now()))

    def begin_wait(self) -> None:
        """From here on others are waited for; no matter where no step is under way."""
        self._num_waits += 1
        if self._marks and self._num_waits == 1:
            self._marks.append((None, self._now()))

    def end_wait(self) -> None:
        """All since `begin_wait` was communication."""
        self._num_waits -= 1
        if self._marks and self._num_waits == 0:
            self.mark("communication")

    def stop(self) -> None:
        """The step under way ends now, with its optimizer."""
        self.mark("optimizer")
        self._unread.append((self._marks, time.process_time() - self._cpu_start_s, self._between))
        self._last_end = self._marks[-1][1]
        self._marks, self._between = [], None

    def steps(self) -> list[Step]:
        """Samples of every step; waits for the device."""
        if self._on_gpu and self._unread:
            self._unread[-1][0][-1][1].synchronize()
        for marks, cpu_s, between in self._unread:
            between_s = None if between is None else self._seconds(*between)
            self._read.append(self._measure(marks, cpu_s, between_s))
        self._unread.clear()
        return list(self._read)

    def step_s(self) -> list[float]:
        """Seconds of every step; waits for the device."""
        return [step.step_s for step in self.steps()]

    def _measure(
        self, marks: Sequence[tuple[Part | None, Any]], cpu_s: float, between_s: float | None
    ) -> Step:
        parts_s: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        of_next_s = 0.0
        for (_, start), (part, end) in itertools.pairwise(marks):
            seconds = self._seconds(start, end)
            if part is None:
                of_next_s += seconds
            elif part == "communication":
                parts_s[part] += seconds
            else:
                parts_s[part] += of_next_s + seconds
                of_next_s = 0.0
        return Step(
            step_s=self._seconds(marks[0][1], marks[-1][1]),
            cpu_s=cpu_s,
            data_s=parts_s["data"],
            forward_backward_s=parts_s["forward_backward"],
            optimizer_s=parts_s["optimizer"],
            communication_s=parts_s["communication"] if self._tells_communication else None,
            between_s=between_s,
        )

    def _seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1000 if self._on_gpu else end - start)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class ClockStops(pl.Callback):
    """First of the callbacks: a step ends before any of them works."""

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
        else:  # a micro-batch; DeepSpeed gives each a chance to step
            self.clock.mark("optimizer" if self._has_gradients else "forward_backward")


class ClockStarts(pl.Callback):
    """Last of the callbacks: a step begins when all of them have worked, on every rank.

    Args:
        is_pause: whether some rank has more to do than the others after so many steps of the run:
            those that have not would else wait for it on the clock.
    """

    def __init__(self, clock: StepClock, is_pause: Callable[[int], bool]) -> None:
        self.clock, self.is_pause = clock, is_pause
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._last_step = trainer.global_step
        trainer.strategy.barrier()
        self.clock.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step > self._last_step and self.is_pause(step):
            trainer.strategy.barrier()
        self._last_step = step
        self.clock.start()

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.training or trainer.validating:
            trainer.strategy.barrier()
            self.clock.start(again=True)
