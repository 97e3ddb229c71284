"""The measuring instruments slow a recipe by at most half a percent."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch import Trainer

import unitransformer.run
from tests.benchmarks.interleaved import WARM_UP, Arm, check
from unitransformer.measure import instruments
from unitransformer.measure.clock import StartClock, StepClock, StepTimes, StopClock

STEPS = WARM_UP + 200
OPTIONS = (
    *("--model.width", "64", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.feedforward-width", "256", "--model.num-positions", "64"),
    *("--model.num-classes", "1000", "--data", "synthetic", "--batch-size", "2"),
    *("--max-steps", str(STEPS), "--validate-every", str(STEPS), "--devices", "1"),
    *("--log-every", str(STEPS), "--strategy", "single"),
)
WHOLE_BATCH = 128  # 8,192 tokens per step


def watch_nothing() -> None:
    """Removes clock and instruments from a run."""
    build_trainer = unitransformer.run.build_trainer
    watchers = (StopClock, StartClock, instruments.Instruments)

    def build(*arguments: Any, callbacks: list[pl.Callback], **options: Any) -> Trainer:
        unwatched = [callback for callback in callbacks if not isinstance(callback, watchers)]
        return build_trainer(*arguments, callbacks=unwatched, **options)

    unitransformer.run.build_trainer = build
    # Values that record and log read from the clock, which never ran.
    step = StepTimes(step_s=1.0, cpu_s=1.0, data_s=0.1, forward_backward_s=0.8, optimizer_s=0.1)
    StepClock.steps = lambda self: [step] * STEPS  # type: ignore[method-assign]


@pytest.mark.alone
def test_measuring_costs_at_most_half_a_percent_of_a_step(tmp_path: Path) -> None:
    """The control sleeps, which must show in wall time; processor time cannot show it."""
    arms = {
        "not watched": Arm(fault=watch_nothing),
        "watched": Arm(),
        "waits": Arm(fault=watch_nothing, waits=0.02),
    }
    allowed = dict.fromkeys(["watched", "waits"], 0.005)
    check(tmp_path, arms, OPTIONS, WHOLE_BATCH, allowed, clocks=("processor", "wall"))
