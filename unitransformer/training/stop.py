"""The ranks of a run agree on the step after which they stop, and leave it together."""

from collections.abc import Callable, Collection
from typing import Any

import lightning.pytorch as pl
import torch.distributed

from unitransformer.launch.signals import StopSignalListener
from unitransformer.measure.clock import StepClock
from unitransformer.stats.stopping_rule import is_check_step, is_narrow
from unitransformer.training.history import gather
from unitransformer.training.module import TrainingModule


class AgreeToStop(pl.Callback):
    """Decides at the end of a step, on every rank alike, whether any of them was asked to stop.

    The ranks ask each other at the end of one step and read the answer at the end of the next: it
    travels while they compute, and nobody waits for it. `exchange` is the callback that asks;
    `callbacks` says where both stand, and why.
    """

    def __init__(self, signals: StopSignalListener) -> None:
        self.signals = signals
        self.exchange = StartExchange(self)
        self._last_step = 0
        self._group: torch.distributed.ProcessGroup | None = None
        self._number = torch.zeros(1, dtype=torch.int32)
        self._answer: torch.distributed.Work | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        if torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        number = self.signals.caught if self._group is None else self._read()
        if number and step < trainer.max_steps:
            pl_module.stop_signal = number
            trainer.should_stop = True

    def on_train_end(self, *args: Any) -> None:
        self._read()

    def ask(self) -> None:
        """Begin to exchange what was caught so far, unless an answer is under way."""
        if self._group is None or self._answer is not None:
            return
        self._number.fill_(self.signals.caught)
        self._answer = torch.distributed.all_reduce(
            self._number, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )

    def _read(self) -> int:
        if self._answer is None:
            return 0
        self._answer.wait()
        self._answer = None
        return int(self._number)


class StartExchange(pl.Callback):
    """Asks when the callbacks before it are done with the step."""

    def __init__(self, agreeing: AgreeToStop) -> None:
        self.agreeing = agreeing

    def on_train_batch_end(self, *args: Any) -> None:
        self.agreeing.ask()


class UntilInterval(pl.Callback):
    """Ends training on all ranks at the same step.

    Args:
        target: width of the interval of the median step, as a share of it.
        unsteady: steps of the run that are known not to be steady.
    """

    def __init__(
        self, target: float, clock: StepClock, unsteady: Callable[[], Collection[int]]
    ) -> None:
        self.target, self.clock, self.unsteady = target, clock, unsteady
        self._first_step = self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        step = trainer.global_step
        if step == self._last_step or not is_check_step(step - self._first_step):
            return
        self._last_step = step
        # What every rank sees alike, they decide alike.
        ranks = gather((self.clock.step_s(), sorted(self.unsteady())), pl_module)
        slowest_s = [max(step_s) for step_s in zip(*(own for own, _ in ranks), strict=True)]
        done = range(len(slowest_s))
        unsteady = {step - self._first_step for _, own in ranks for step in own} & {*done}
        if is_narrow(
            slowest_s, self.target, unsteady=unsteady
        ):  # else a signal may have stopped it
            trainer.should_stop = True
