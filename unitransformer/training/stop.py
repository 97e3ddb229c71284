"""Stops all ranks at the same step: after a signal, a NaN loss, or at a narrow interval."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import lightning.pytorch as pl
import torch.distributed

from unitransformer.launch.signals import Stopped, StopSignalListener
from unitransformer.measure.clock import StepClock
from unitransformer.stats.intervals import describe
from unitransformer.stats.steady_state import find_steady_state
from unitransformer.training.history import gather

DIVERGED = 1000  # exchanged in place of the number of a signal, all of which are lower
FIRST_CHECK = 64  # steps
GROWTH = 1.25  # of the number of steps, from one check to the next
CONFIDENCE = 0.99  # of the interval that is checked; the published one has 0.95


class AgreeToStop(pl.Callback):
    """Stops all ranks after the same step if one has received a signal or its loss is not finite.

    The ranks start an all-reduce at the end of one step (callback `exchange`) and read its result
    at the end of the next, so that nobody waits for it. `build_callbacks` explains their order.
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
            group: Any = torch.distributed.new_group(backend="gloo")
            self._group = group

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        number = self._number_here(pl_module) if self._group is None else self._read()
        if not number or step == trainer.max_steps:
            return
        if number == DIVERGED:  # the record names the first such step
            pl_module.stop_error = FloatingPointError("the loss is not finite")
            return
        pl_module.stop_error = Stopped(number, step=step)
        trainer.should_stop = True

    def on_train_end(self, *args: Any) -> None:
        self._read()

    def start_exchange(self, pl_module: Any) -> None:
        """Starts to exchange the reasons to stop, unless an exchange is under way."""
        if self._group is None or self._answer is not None:
            return
        self._number.fill_(self._number_here(pl_module))
        self._answer = torch.distributed.all_reduce(
            self._number, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )

    def _number_here(self, pl_module: Any) -> int:
        return DIVERGED if pl_module.has_diverged else self.signals.caught

    def _read(self) -> int:
        if self._answer is None:
            return 0
        self._answer.wait()
        self._answer = None
        return int(self._number)


class StartExchange(pl.Callback):
    """Starts the exchange of `AgreeToStop` after the callbacks before it."""

    def __init__(self, agreement: AgreeToStop) -> None:
        self.agreement = agreement

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.agreement.start_exchange(pl_module)


class UntilInterval(pl.Callback):
    """Stops training when the interval of the median step time is narrow enough.

    Args:
        target: width of the interval relative to the median.
        excluded_steps: returns the steps of the run that are known not to be steady.
    """

    def __init__(
        self, target: float, clock: StepClock, excluded_steps: Callable[[], Collection[int]]
    ) -> None:
        self.target, self.clock, self.excluded_steps = target, clock, excluded_steps
        self._first_step = self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if step == self._last_step or not is_check_step(step - self._first_step):
            return
        self._last_step = step
        # All ranks decide on the same data, and so reach the same decision.
        ranks = gather((self.clock.step_s(), sorted(self.excluded_steps())), pl_module)
        slowest_s = [max(times_s) for times_s in zip(*(step_s for step_s, _ in ranks), strict=True)]
        excluded = {step - self._first_step for _, steps in ranks for step in steps}
        excluded &= {*range(len(slowest_s))}
        if is_narrow(slowest_s, self.target, excluded_steps=excluded):
            trainer.should_stop = True  # never set to False: a signal may have set it


def is_check_step(num_steps: int) -> bool:
    """Whether to check the interval after this many steps: 64, and each time a quarter more.

    A check reads the clock, which synchronizes a GPU, and takes time in proportion to the steps.
    With growing distances all checks together cost less than five times the last one.
    """
    check = float(FIRST_CHECK)
    while round(check) < num_steps:
        check *= GROWTH
    return round(check) == num_steps


def is_narrow(
    step_s: Sequence[float], target: float, *, excluded_steps: Collection[int] = ()
) -> bool:
    """Whether the 99 % interval of the median steady step is at most as wide as `target`.

    A run that stops at the first narrow interval often stops at one that is narrow by chance, and
    then the interval covers less than it promises. Hence the checks are few, and their interval is
    stricter than the published one of 95 %, which is narrower still (Chow & Robbins 1965 prove the
    coverage in the limit of a small target; the tests show it here).

    Args:
        step_s: seconds of the steps of this launch on the slowest rank: ranks have to agree.
        target: width of the interval as a share of the median: 0.01 for 1 %.
        excluded_steps: steps known not to be steady, as for `find_steady_state`.

    Raises:
        ValueError: the target is outside (0, 1).
    """
    if not 0 < target < 1:
        raise ValueError(f"target is {target}; give a share between 0 and 1, such as 0.01 for 1 %")
    steady_s = find_steady_state(step_s, excluded_steps).select(step_s)
    if not steady_s:
        return False
    width = describe(steady_s, confidence=CONFIDENCE).relative_width
    return width is not None and width <= target
