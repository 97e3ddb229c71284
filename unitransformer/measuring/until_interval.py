"""`--until-interval`: training goes on until the median step is known well enough."""

from collections.abc import Callable, Collection

import lightning.pytorch as pl

from unitransformer.history import gather
from unitransformer.measuring.clock import StepClock
from unitransformer.statistics.stopping import is_look, is_narrow
from unitransformer.training import TrainingModule


class UntilInterval(pl.Callback):
    """Asks all ranks to stop; before the callbacks that act on the last step.

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
        if step == self._last_step or not is_look(step - self._first_step):
            return
        self._last_step = step
        # What every rank sees alike, they decide alike.
        ranks = gather((self.clock.step_s(), sorted(self.unsteady())), pl_module)
        slowest_s = [max(step_s) for step_s in zip(*(own for own, _ in ranks), strict=True)]
        done = range(len(slowest_s))
        unsteady = {step - self._first_step for _, own in ranks for step in own} & {*done}
        trainer.should_stop = is_narrow(slowest_s, self.target, unsteady=unsteady)
