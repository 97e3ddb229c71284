"""Tests the order of a run's callbacks, which `MUST_PRECEDE` explains."""

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest

from recipes import gpt
from unitransformer.callbacks import MUST_PRECEDE, build_callbacks, check_order
from unitransformer.checkpoint.callbacks import Resume, SaveCheckpoints
from unitransformer.config import DataConfig, ParallelConfig, RunConfig
from unitransformer.launch.signals import StopSignalListener
from unitransformer.measure.clock import StartClock, StepClock, StopClock
from unitransformer.measure.instruments import Instruments
from unitransformer.training.progress import LogLines
from unitransformer.training.stop import AgreeToStop, StartExchange


def build(folder: Path | None, *, has_all: bool = True) -> list[pl.Callback]:
    config = RunConfig(
        recipe="gpt",
        size="reference",
        model=gpt.PRESET.model_config("reference"),
        data=DataConfig(source="synthetic"),
        parallel=ParallelConfig(
            accelerator="cpu", devices=2 if has_all else 1, strategy="ddp" if has_all else "single"
        ),
        batch_size=2,
        max_steps=100,
    )
    if has_all:
        config = replace(config, until_interval=0.01)
    clock = StepClock()
    saver = None if folder is None else SaveCheckpoints(folder, every=0, get_run_state=dict)
    return build_callbacks(
        config,
        clock,
        agreement=AgreeToStop(StopSignalListener()),
        instruments=Instruments(config, first_step=0, trace_folder=folder),
        lines=LogLines(config, clock, lambda line: None),
        saver=saver,
        resume=None if folder is None else Resume(folder, {}),
        has_bar=has_all,
    )


def test_the_full_list_holds_every_callback_that_a_constraint_names(
    tmp_path: Path,
) -> None:
    kinds = {type(callback) for callback in build(tmp_path)}
    named = {kind for first, then, _ in MUST_PRECEDE for kind in first + then} - {pl.Callback}
    assert named <= kinds


def test_a_run_without_options_has_the_six_callbacks_that_every_run_needs() -> None:
    kinds = [type(callback) for callback in build(None, has_all=False)]
    assert kinds == [StopClock, AgreeToStop, Instruments, LogLines, StartExchange, StartClock]


@pytest.mark.parametrize(
    ("first", "then", "reason"),
    [(a, b, reason) for first, then, reason in MUST_PRECEDE for a in first for b in then],
)
def test_a_list_that_breaks_a_constraint_is_refused_with_its_reason(
    first: type[pl.Callback], then: type[pl.Callback], reason: str, tmp_path: Path
) -> None:
    callbacks = {type(callback): callback for callback in build(tmp_path)}
    callbacks[pl.Callback] = callbacks[LogLines]  # one of them all
    with pytest.raises(AssertionError, match=f"must precede .*: {reason}"):
        check_order([callbacks[then], callbacks[first]])


def test_swapping_the_clock_with_its_neighbour_is_refused(tmp_path: Path) -> None:
    callbacks = build(tmp_path)
    assert type(callbacks[0]) is StopClock
    assert type(callbacks[-1]) is StartClock
    with pytest.raises(AssertionError, match="StopClock must precede"):
        check_order([callbacks[1], callbacks[0], *callbacks[2:]])
    with pytest.raises(AssertionError, match="must precede StartClock"):
        check_order([*callbacks[:-2], callbacks[-1], callbacks[-2]])
