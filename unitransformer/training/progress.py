"""Reports the progress of a run: log lines, a progress bar, and a file for other processes."""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unitransformer.config import RunConfig
from unitransformer.costs.flops import flops_per_sample
from unitransformer.files import write_atomically
from unitransformer.measure.clock import StepClock
from unitransformer.record.log_lines import is_due, ms_per_step, step_line, validation_line
from unitransformer.record.units import UNIT, format_count, format_duration

TIMED_STEPS = 3  # for an estimate, without the first step, which is slower
MIN_ESTIMATE_S = 10  # shorter estimates are not printed


class TimeLeft(pl.Callback):
    """Prints the plan before the first step, and an estimate of the time left after a few steps.

    Args:
        matmul_flops_per_s: returns this rank's speed in matrix products, if it was measured.
    """

    def __init__(
        self,
        config: RunConfig,
        clock: StepClock,
        print_line: Callable[[str], None],
        matmul_flops_per_s: Callable[[], float | None],
    ) -> None:
        self.config, self.clock, self.print_line = config, clock, print_line
        self.matmul_flops_per_s = matmul_flops_per_s
        self._is_estimated = False

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        config, first_step = self.config, trainer.global_step
        samples = config.global_batch_size
        units = f"{samples * config.tokens_per_sample:,} {UNIT[config.recipe]}"
        num_steps = config.max_steps - first_step
        if config.until_interval is not None:
            self.print_line(f"plan    up to {format_count(num_steps, 'step')} of {units}")
            return
        validations = self._format_validations(first_step + 1)
        plan = f"{format_count(num_steps, 'step')} of {units}, {validations}"
        if rate := self.matmul_flops_per_s():
            # A lower bound: a causal mask may halve attention, and validation is left out.
            flops = flops_per_sample(config, causal=True) * samples / config.parallel.world_size
            if (least_s := num_steps * flops / rate) >= 1:
                least = format_duration(least_s)
                plan += f"; at least {least} at the matrix product speed just measured"
        self.print_line(f"plan    {plan}")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        config, step = self.config, trainer.global_step
        # Reading the clock waits for the device, which a line that is due does anyway.
        if self._is_estimated or config.until_interval is not None or not is_due(config, step):
            return
        step_s = self.clock.step_s()[1:]
        self._is_estimated = len(step_s) >= TIMED_STEPS
        if not self._is_estimated:
            return
        median_s, num_steps = statistics.median(step_s), config.max_steps - step
        # The forward pass takes about a third of forward and backward.
        validation_s = median_s / config.accumulate * config.validation_batches / 3
        left_s = num_steps * median_s + self._count_validations(step) * validation_s
        if left_s >= MIN_ESTIMATE_S:
            steps = f"{format_count(num_steps, 'step')} of {median_s:.2g} s"
            rest = f"{steps}, {self._format_validations(step)}"
            self.print_line(f"time    about {format_duration(left_s)} of training left: {rest}")

    def _count_validations(self, step: int) -> int:
        """Returns how many follow `step` or a later one; the last step always validates."""
        every = self.config.validate_every
        return math.ceil(self.config.max_steps / every) - (step - 1) // every

    def _format_validations(self, step: int) -> str:
        return format_count(self._count_validations(step), "validation")


class LogLines(pl.Callback):
    """Prints a line every `log_every` optimizer steps and after each validation.

    The lines show this rank's loss and time. `lines` keeps them for the record. A loss that is not
    finite sets `has_diverged` of the module, with which `AgreeToStop` ends the run.

    Args:
        file: receives step, speed and time left with every line; None on all ranks but rank 0.
        record: future path of the run's record; `file` names it from the start.
    """

    def __init__(
        self,
        config: RunConfig,
        clock: StepClock,
        print_line: Callable[[str], None],
        file: Path | None = None,
        record: Path | None = None,
    ) -> None:
        self.config, self.clock, self.print_line, self.file = config, clock, print_line, file
        self.record = None if record is None else str(record.absolute())
        self.lines: list[str] = []
        self.newest = ""  # loss and speed, for the progress bar
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._last_step = trainer.global_step
        self._write_file(self._last_step, 0.0, None, "")
        if trainer.world_size > 1:
            self.print_line("lines   of rank 0; the record has the mean loss and the slowest time")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if step == self._last_step or not (is_due(self.config, step) or trainer.should_stop):
            return
        recent_s = self.clock.step_s()[self._last_step - step :]
        self._last_step = step
        loss, step_s = pl_module.last_loss(), statistics.median(recent_s)
        is_finite = math.isfinite(loss)
        pl_module.has_diverged |= not is_finite
        rate = self.config.optimizer.learning_rate_at(step - 1)
        for logger in trainer.loggers:
            metrics = {"loss": loss, "learning_rate": rate, "step_s": step_s}
            logger.log_metrics(metrics, step=step)
        pace = ms_per_step(recent_s).strip()
        self.newest = f"loss {loss:.4f}, {pace}"
        self._write_file(step, step_s, loss if is_finite else None, pace)  # JSON has no NaN
        self._log(step_line(self.config, step, loss=loss, recent_s=recent_s))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.validation:
            newest = pl_module.validation[-1]
            pl_module.has_diverged |= not math.isfinite(newest["val_loss"])
            self._log(validation_line(self.config, newest))

    def _write_file(self, step: int, step_s: float, loss: float | None, pace: str) -> None:
        if self.file is None:
            return
        progress = {
            "record": self.record,
            "step": step,
            "max_steps": self.config.max_steps,
            "loss": loss,
            "pace": pace,
            "left_s": (self.config.max_steps - step) * step_s,
            "at_s": time.time(),
        }
        with contextlib.suppress(OSError):  # a full disk is an error only where data is lost
            write_atomically(self.file, json.dumps(progress).encode())

    def _log(self, line: str) -> None:
        self.lines.append(line)
        self.print_line(line)


class ProgressBar(pl.Callback):
    """Shows a progress bar with the newest loss and speed."""

    def __init__(self, config: RunConfig, lines: LogLines) -> None:
        self.config, self.lines = config, lines
        columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, TextColumn("{task.description}"))
        self._task = self._bar.add_task("", total=config.max_steps)

    def on_train_start(self, *args: Any) -> None:
        self._bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        text = self.lines.newest
        self._bar.update(self._task, completed=trainer.global_step, description=text)

    def on_train_end(self, *args: Any) -> None:
        self._bar.stop()

    def on_exception(self, *args: Any) -> None:
        self._bar.stop()
