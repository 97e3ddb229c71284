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
from unitransformer.measuring.clock import StepClock
from unitransformer.records import write_atomically
from unitransformer.tasks import METRIC, UNIT, metric_in_words, metric_value, rate_in_words
from unitransformer.training import TrainingModule


class LogLines(pl.Callback):
    """Says and keeps one line every `log_every` optimizer steps, and one a validation.

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

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        step = trainer.global_step
        if step == self._last_step or not (is_due(self.config, step) or trainer.should_stop):
            return
        recent_s = self.clock.step_s()[self._last_step - step :]
        self._last_step = step
        step_s = statistics.median(recent_s)
        figures = {
            "loss": pl_module.last_loss(),
            "learning_rate": self.config.optimizer.learning_rate_at(step - 1),
            f"{UNIT[self.config.recipe]}_per_s": self._units_per_step() / step_s,
        }
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
        unit = UNIT[self.config.recipe]
        rate = rate_in_words(self._units_per_step() / step_s, unit)
        self.newest = f"loss {figures['loss']:.4f}, {rate}"
        self._tell(step, step_s, figures["loss"], rate)
        self._keep(
            f"step {step:>{len(str(self.config.max_steps))}}/{self.config.max_steps}"
            f" | loss {figures['loss']:8.4f}"
            f" | lr {figures['learning_rate']:.2e}"
            f" | {step_s * 1000:8.1f} ms/step"
            f" | {rate:>17}"
        )

    def on_validation_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if pl_module.validation:
            self._keep(validation_line(self.config, pl_module.validation[-1]))

    def _units_per_step(self) -> int:
        return self.config.global_batch_size * self.config.tokens_per_sample

    def _tell(self, step: int, step_s: float, loss: float | None, rate: str) -> None:
        if self.file is None:
            return
        told = {
            "record": self.record,
            "step": step,
            "max_steps": self.config.max_steps,
            "loss": loss,
            "rate": rate,
            "left_s": (self.config.max_steps - step) * step_s,
            "at_s": time.time(),
        }
        with contextlib.suppress(OSError):  # a full disk is told where something is lost by it
            write_atomically(self.file, json.dumps(told).encode())

    def _keep(self, line: str) -> None:
        self.lines.append(line)
        self.say(line)


def is_due(config: RunConfig, step: int) -> bool:
    """Whether a line is said after `step` steps."""
    return step in (1, config.max_steps) or step % config.log_every == 0


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


def validation_line(config: RunConfig, point: dict[str, float]) -> str:
    """Loss and the task's metric of one validation."""
    metric = METRIC[config.recipe]
    value = metric_value(config.recipe, loss=point["val_loss"], accuracy=point["val_accuracy"])
    return (
        f"step {point['step']:>{len(str(config.max_steps))}}/{config.max_steps}"
        f" | validation loss {point['val_loss']:.4f} | {metric} {metric_in_words(metric, value)}"
    )
