"""Tests what several ranks measure together."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed

from recipes import gpt
from recipes.command_line import run_recipe
from scaling.store.reader import load_store
from tests.distributed.forking import fork_command
from tests.distributed.launching import (
    begin,
    environment,
    load,
    recipe_arguments,
    train,
    wait_for_text,
)
from tests.processes import PATIENCE_S, wait_until_ended
from unitransformer.objectives import Objective
from unitransformer.record.schema import load_record
from unitransformer.training import module
from unitransformer.training.module import TrainingModule
from unitransformer.training.progress import LogLines

TWO = ("--devices", "2", "--batch-size", "4")
PAUSE_S = 0.5


def say_slowly_on_the_first_rank() -> None:
    keep = LogLines._log

    def keep_slowly(self: LogLines, line: str) -> None:
        if torch.distributed.get_rank() == 0:
            time.sleep(PAUSE_S)
        keep(self, line)

    LogLines._log = keep_slowly  # type: ignore[method-assign]


@pytest.mark.alone
def test_work_of_one_rank_between_steps_is_in_no_step_time(tmp_path: Path) -> None:
    options = (*TWO, "--max-steps", "6", "--validate-every", "4", "--log-every", "2")
    process = begin("gpt", tmp_path / "run", *options, fault=say_slowly_on_the_first_rank)
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert max(load(tmp_path / "run")["step_s"]) < PAUSE_S


def test_peak_tensor_bytes_repeat_exactly_between_launches(tmp_path: Path) -> None:
    options = (*TWO, "--max-steps", "6", "--validate-every", "6", "--strategy", "ddp")
    peaks = [
        train("gpt", tmp_path / str(n), *options, is_whole=True)["peak_bytes"] for n in range(3)
    ]
    assert peaks == [peaks[0]] * 3
    assert peaks[0][0] == peaks[0][1], "and on both ranks"


def test_log_lines_show_the_samples_and_name_the_slowest_of_two_ranks(
    tmp_path: Path,
) -> None:
    options = ("--max-steps", "9", "--validate-every", "4", "--log-every", "2")
    one = train("gpt", tmp_path / "one", *options)
    (run,) = load_store([tmp_path / "one"], relative_to=tmp_path).runs
    assert run.log == one["log"]
    train("gpt", tmp_path / "two", *TWO, *options, "--strategy", "ddp")
    assert "of rank 0; the record has the mean loss" in (tmp_path / "two/rank-0.log").read_text()


def test_a_trace_of_two_ranks_separates_communication(tmp_path: Path) -> None:
    options = (*TWO, "--max-steps", "12", "--validate-every", "12", "--strategy", "ddp")
    record = train("gpt", tmp_path / "run", *options, "--trace", str(tmp_path / "trace"))
    parts = {row["part"]: row["share"] for row in record["trace"][0]["rows"]}
    assert 0 < parts["communication"] < 1
    assert sum(parts.values()) == pytest.approx(1)
    assert list((tmp_path / "trace").glob("*.json*"))


def test_a_timed_step_that_recompiles_is_excluded_and_flagged(
    tmp_path: Path,
) -> None:
    def inject() -> None:
        training_step = TrainingModule.training_step

        def compile_soon(objective: Objective, *_: Any, **__: Any) -> None:
            objective.compile(backend="eager", fullgraph=True)  # traced, but not compiled

        def compile_late(self: TrainingModule, batch: Any, *arguments: Any) -> Any:
            time.sleep(0.02)  # long enough that other load changes a step little
            if self.trainer.global_step == 36:
                torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(3))
            return training_step(self, batch, *arguments)

        module.compile_objective = compile_soon
        TrainingModule.training_step = compile_late  # type: ignore[method-assign]

    # So few steps are not searched for a change of level, which other load can make at any step.
    options = ("--max-steps", "44", "--validate-every", "44", "--compile", "default")
    process = begin("gpt", tmp_path / "run", *options, fault=inject)
    process.join(PATIENCE_S)
    assert process.exitcode == 0, (tmp_path / "run/output.log").read_text()
    record = load(tmp_path / "run")
    assert record["compile"][0]["graphs"] == 2
    assert record["steady_from"] <= 36
    assert "recompiled at step 37, one of the timed steps" in record["flags"]
    assert {"step": 36, "reason": "compiled"} in record["excluded_steps"]


def test_ranks_stop_at_the_same_step_once_the_interval_is_narrow_enough(tmp_path: Path) -> None:
    options = (*TWO, "--max-steps", "2000", "--validate-every", "2000", "--until-interval", "0.9")
    record = train("gpt", tmp_path / "run", *options)
    assert record["status"] == "ok"
    assert 64 <= len(record["step_s"]) < 2000
    assert set(record["samples"]["slowest_rank"]) <= {0, 1}


def test_a_run_whose_interval_stays_too_wide_is_flagged(tmp_path: Path) -> None:
    options = ("--max-steps", "20", "--validate-every", "20", "--until-interval", "0.1%")
    flags = train("gpt", tmp_path / "run", *options)["flags"]
    assert "the width of the interval is unknown; until_interval is 0.1%" in flags


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_repeated_run_reaches_the_launch_and_its_record(
    number: signal.Signals, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    arguments = recipe_arguments(
        *("gpt", folder, "--max-steps", "100000", "--repeats", "3", "--log-every", "1")
    )
    place = arguments.index("--record")
    del arguments[place : place + 2]
    folder.mkdir()
    process = fork_command(
        lambda: run_recipe(gpt.PRESET, gpt.show, arguments),
        log=tmp_path / "output.log",
        variables=environment(tmp_path),
    )
    wait_for_text(tmp_path / "output.log", "\nstep ")
    (run,) = psutil.Process(process.pid).children()
    os.kill(process.pid or 0, number)
    process.join(PATIENCE_S)
    assert process.exitcode == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]
    wait_until_ended([run])
    (path,) = folder.glob("*/*.json")
    assert load_record(path)["status"] == "preempted"


def test_lightning_does_not_poll_for_signals_in_a_timed_step(tmp_path: Path) -> None:
    def watch() -> None:
        begin_step, broadcast = LogLines.on_train_start, torch.distributed.broadcast

        def on_train_start(self: LogLines, *arguments: Any) -> None:
            def broadcast_outside(*tensors: Any, **options: Any) -> Any:
                if self.clock._marks:
                    os._exit(3)  # Lightning would hide an exception
                return broadcast(*tensors, **options)

            begin_step(self, *arguments)
            torch.distributed.broadcast = broadcast_outside

        LogLines.on_train_start = on_train_start  # type: ignore[method-assign]

    process = begin("gpt", tmp_path / "run", *TWO, "--strategy", "fsdp", fault=watch)
    process.join(PATIENCE_S)
    assert process.exitcode == 0, (tmp_path / "run" / "output.log").read_text()[-2000:]
