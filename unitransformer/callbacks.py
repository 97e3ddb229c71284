"""Builds the list of callbacks of a run, in the order in which Lightning calls them at every hook.

`MUST_PRECEDE` gives the reasons for the order, and `build_callbacks` checks its list against them.
"""

from collections.abc import Sequence

import lightning.pytorch as pl

from unitransformer.checkpoint.callbacks import Resume, SaveCheckpoints
from unitransformer.config import RunConfig
from unitransformer.measure.clock import StartClock, StepClock, StopClock
from unitransformer.measure.communication import TimeGradientReduction
from unitransformer.measure.instruments import Instruments
from unitransformer.profiling.profiler import TraceCallback
from unitransformer.record.log_lines import is_due
from unitransformer.training.progress import LogLines, ProgressBar, TimeLeft
from unitransformer.training.stop import AgreeToStop, StartExchange, UntilInterval, is_check_step

Kinds = tuple[type[pl.Callback], ...]
# Callbacks of the first types come before all others of the second types, for this reason.
MUST_PRECEDE: tuple[tuple[Kinds, Kinds, str], ...] = (
    ((StopClock,), (pl.Callback,), "a step ends on the clock before other callbacks run"),
    ((pl.Callback,), (StartClock,), "a step begins on the clock after other callbacks ran"),
    (
        (TimeGradientReduction,),
        (TraceCallback,),
        "the work of a trace after the backward pass is not communication",
    ),
    (
        (AgreeToStop,),
        (TraceCallback, Instruments),
        "they start and stop profilers, which corrupts the memory of an unfinished collective",
    ),
    (
        (TraceCallback, Instruments),
        (StartExchange,),
        "it starts a collective, which must not be in progress when a profiler starts or stops",
    ),
    ((TraceCallback,), (Instruments,), "a trace must not record the ceilings measured at the end"),
    ((Instruments,), (UntilInterval,), "the interval excludes unsteady steps"),
    (
        (AgreeToStop, UntilInterval),
        (LogLines, SaveCheckpoints),
        "they decide whether this step is the last, which is logged and saved",
    ),
    ((LogLines,), (SaveCheckpoints,), "a step is logged even if saving it is slow or fails"),
    ((LogLines,), (ProgressBar,), "the bar shows the loss and speed of the newest line"),
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
    """Returns the callbacks of a run, in an order that obeys `MUST_PRECEDE`."""
    until_interval = (
        None
        if config.until_interval is None
        else UntilInterval(config.until_interval, clock, lambda: instruments.excluded_steps)
    )
    slots = (
        StopClock(clock),
        TimeGradientReduction(clock) if config.parallel.strategy == "ddp" else None,
        agreement,
        instruments.trace,
        instruments,
        until_interval,
        lines,
        saver,
        time_left,
        ProgressBar(config, lines) if has_bar else None,
        resume,  # acts only before training
        agreement.exchange,
        StartClock(clock, lambda step: _needs_barrier(config, instruments, step)),
    )
    callbacks: list[pl.Callback] = [callback for callback in slots if callback is not None]
    check_order(callbacks)
    return callbacks


def check_order(callbacks: Sequence[pl.Callback]) -> None:
    """Raises AssertionError with the reason if two callbacks are in the wrong order."""
    for position, later in enumerate(callbacks):
        for earlier in callbacks[:position]:
            for first, then, reason in MUST_PRECEDE:
                is_wrong = isinstance(later, first) and isinstance(earlier, then)
                names = f"{type(later).__name__} must precede {type(earlier).__name__}"
                assert not is_wrong, f"{names}: {reason}"


def _needs_barrier(config: RunConfig, instruments: Instruments, step: int) -> bool:
    """Whether a rank does something other than training after `step` steps of the run."""
    checks_interval = config.until_interval is not None and is_check_step(
        step - instruments.first_step
    )
    return checks_interval or is_due(config, step) or instruments.needs_barrier(step)
