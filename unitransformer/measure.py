"""Clocks and memory of a training run: seconds of every optimizer step, where steady begins.

The clock sees data, forward, backward and optimizer; validation, logging and saving stand outside
it. On a GPU it is a pair of CUDA events a step, read when training is over.
"""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch


class StepClock:
    """Seconds of each optimizer step on this rank, from `start` to `stop`."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        self._on_gpu = on_gpu
        self._spans: list[tuple[Any, Any]] = []
        self._seconds: list[float] = []  # of the spans that were read already
        self._start: Any = None

    def start(self, *, again: bool = False) -> None:
        """The next step begins now; a step under way goes on unless it begins `again`."""
        if self._start is None or again:
            self._start = self._now()

    def stop(self) -> None:
        """The step under way ends now."""
        self._spans.append((self._start, self._now()))
        self._start = None

    def step_s(self) -> list[float]:
        """Seconds of every step; waits for the device."""
        unread = self._spans[len(self._seconds) :]
        if self._on_gpu and unread:
            unread[-1][1].synchronize()
            self._seconds += [start.elapsed_time(end) / 1000 for start, end in unread]
        else:
            self._seconds += [end - start for start, end in unread]
        return list(self._seconds)

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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            self.clock.stop()


class ClockStarts(pl.Callback):
    """Last of the callbacks: a step begins when all of them have worked."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_start(self, *args: Any) -> None:
        self.clock.start()

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.start()

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.training or trainer.validating:
            self.clock.start(again=True)


def peak_bytes(device: torch.device) -> int:
    """CUDA: most bytes allocated for tensors. CPU: largest resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
