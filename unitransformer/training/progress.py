"""How a training run talks: a line every few steps, a bar where somebody watches, and a small file
for those who look from elsewhere.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unitransformer.config import RunConfig
from unitransformer.files import write_atomically
from unitransformer.measure.clock import StepClock
from unitransformer.record.log_lines import is_due, ms_per_step, step_line, validation_line
from unitransformer.training.module import TrainingModule


class LogLines(pl.Callback):
    """Says and keeps one line every `log_every` optimizer steps, and one a validation: what this
    rank sees. The record has the mean loss and the slowest rank's time of every step.

    Args:
        say: takes a finished line; the lines are kept in `lines` whoever listens.
        file: gets step, speed and time left with every line; None on all ranks but the first.
        record: where the run's record will be, which stands in `file` from the start.
    """

    def __init__(
        self,
        config: RunConfig,
        clock: StepClock,
        say: Callable[[str], None],
        file: Path | None = None,
        record: Path | None = None,
    ) -> None:
        self.config, self.clock, self.say, self.file = config, clock, say, file
        self.record = None if record is None else str(record.absolute())
        self.lines: list[str] = []
        self.newest = ""  # loss and speed alone: what a bar has room for
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._last_step = trainer.global_step
        self._tell(self._last_step, 0.0, None, "")
        if trainer.world_size > 1:
            self.say(
                "lines   of what rank 0 sees; the record has the mean loss and the slowest rank"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        step = trainer.global_step
        if step == self._last_step or not (is_due(self.config, step) or trainer.should_stop):
            return
        recent_s = self.clock.step_s()[self._last_step - step :]
        self._last_step = step
        loss = pl_module.last_loss()
        figures = {
            "loss": loss,
            "learning_rate": self.config.optimizer.learning_rate_at(step - 1),
            "step_s": statistics.median(recent_s),
        }
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
        pace = ms_per_step(recent_s).strip()
        self.newest = f"loss {loss:.4f}, {pace}"
        self._tell(step, figures["step_s"], loss, pace)
        self._keep(step_line(self.config, step, loss=loss, recent_s=recent_s))

    def on_validation_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if pl_module.validation:
            self._keep(validation_line(self.config, pl_module.validation[-1]))

    def _tell(self, step: int, step_s: float, loss: float | None, pace: str) -> None:
        if self.file is None:
            return
        told = {
            "record": self.record,
            "step": step,
            "max_steps": self.config.max_steps,
            "loss": loss,
            "pace": pace,
            "left_s": (self.config.max_steps - step) * step_s,
            "at_s": time.time(),
        }
        with contextlib.suppress(OSError):  # a full disk is told where something is lost by it
            write_atomically(self.file, json.dumps(told).encode())

    def _keep(self, line: str) -> None:
        self.lines.append(line)
        self.say(line)


class Bar(pl.Callback):
    """A rich progress bar with the newest loss and speed."""

    def __init__(self, config: RunConfig, lines: LogLines) -> None:
        self.config, self.lines = config, lines
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
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
