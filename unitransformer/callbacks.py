"""The callbacks of a run, in the one order in which they work.

Lightning calls them in the order of the list at every hook. `MUST_PRECEDE` holds the reasons for
that order, and `build_callbacks` checks its list against them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import lightning.pytorch as pl

from unitransformer.checkpoint.callbacks import Resume, SaveCheckpoints
from unitransformer.config import RunConfig
from unitransformer.measure.clock import StartClock, StepClock, StopClock
from unitransformer.measure.communication import TimeGradientReduction
from unitransformer.measure.instruments import Instruments
from unitransformer.profiling.profiler import TraceCallback
from unitransformer.record.log_lines import is_due
from unitransformer.stats.stopping_rule import is_check_step
from unitransformer.training.progress import LogLines, ProgressBar, TimeLeft
from unitransformer.training.stop import AgreeToStop, StartExchange, UntilInterval


class Precedence(NamedTuple):
    """Every callback of type `first` comes before every other one of type `then`."""

    first: type[pl.Callback]
    then: type[pl.Callback]
    reason: str


MUST_PRECEDE = (
    Precedence(
        StopClock, pl.Callback, "a step ends on the clock before any other callback takes time"
    ),
    Precedence(
        pl.Callback, StartClock, "the next step begins on the clock when all others are done"
    ),
    Precedence(
        TimeGradientReduction,
        TraceCallback,
        "what a trace does after the backward pass is not communication",
    ),
    Precedence(
        AgreeToStop,
        TraceCallback,
        "starting or stopping a profiler corrupts a collective under way",
    ),
    Precedence(AgreeToStop, Instruments, "they start and stop a profiler, which counts tensors"),
    Precedence(
        TraceCallback,
        StartExchange,
        "its collective begins once no profiler starts or stops any more",
    ),
    Precedence(
        Instruments, StartExchange, "its collective begins once no profiler starts or stops"
    ),
    Precedence(
        TraceCallback, Instruments, "a trace that training ends must not hold the ceiling's work"
    ),
    Precedence(Instruments, UntilInterval, "the interval leaves out steps known to be unsteady"),
    Precedence(AgreeToStop, LogLines, "the last step, which gets a line, is decided before"),
    Precedence(UntilInterval, LogLines, "the last step, which gets a line, is decided before"),
    Precedence(AgreeToStop, SaveCheckpoints, "the last step, which is saved, is decided before"),
    Precedence(UntilInterval, SaveCheckpoints, "the last step, which is saved, is decided before"),
    Precedence(
        LogLines, SaveCheckpoints, "a step has its line even if saving it takes long or fails"
    ),
    Precedence(LogLines, ProgressBar, "the bar shows the newest line's loss and speed"),
)


def build_callbacks(
    config: RunConfig,
    clock: StepClock,
    *,
    agreement: AgreeToStop,
    instruments: Instruments,
    lines: LogLines,
    saver: SaveCheckpoints | None,
    resume: Resume | None,
    time_left: TimeLeft | None = None,
    has_bar: bool,
) -> list[pl.Callback]:
    """All callbacks of a run; the order obeys `MUST_PRECEDE`."""
    target = config.until_interval
    slots = (
        StopClock(clock),
        TimeGradientReduction(clock) if config.parallel.strategy == "ddp" else None,
        agreement,
        instruments.trace,
        instruments,
        None if target is None else UntilInterval(target, clock, lambda: instruments.unsteady),
        lines,
        saver,
        time_left,
        ProgressBar(config, lines) if has_bar else None,
        resume,  # acts before training, where no order matters
        agreement.exchange,
        StartClock(clock, lambda step: _is_pause(config, instruments, step)),
    )
    callbacks: list[pl.Callback] = [callback for callback in slots if callback is not None]
    check_order(callbacks)
    return callbacks


def check_order(callbacks: Sequence[pl.Callback]) -> None:
    """Raises AssertionError for two callbacks in the wrong order, with the reason."""
    for position, later in enumerate(callbacks):
        for earlier in callbacks[:position]:
            for first, then, reason in MUST_PRECEDE:
                is_wrong = isinstance(later, first) and isinstance(earlier, then)
                names = f"{type(later).__name__} must precede {type(earlier).__name__}"
                assert not is_wrong, f"{names}: {reason}"


def _is_pause(config: RunConfig, instruments: Instruments, step: int) -> bool:
    """Whether some rank does more than train after `step` steps of the run."""
    looks = config.until_interval is not None and is_check_step(step - instruments.first_step)
    return looks or is_due(config, step) or instruments.needs_barrier(step)
