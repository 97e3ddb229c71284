"""A signal stops all ranks after the same step with a checkpoint, and the run resumes exactly.

A loss that is not finite stops them too.
"""

import itertools
import math
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from tests.distributed.launching import begin, load, train, wait_for_ranks, wait_for_text
from tests.processes import PATIENCE_S
from unitransformer.checkpoint.reader import list_checkpoints
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE
from unitransformer.objectives import Batch, Objective
from unitransformer.training.module import TrainingModule

STEPS = 40
TWO = ("--devices", "2", "--batch-size", "4", "--max-steps", str(STEPS), "--log-every", "1")
NOT_VALIDATED = ("--validate-every", str(STEPS))
SENT, SENT_IN_PROOF = 10, 50


def slow_rank() -> None:
    """A fault: rank 1 is slower in every step, so rank 0 nearly always waits for it."""
    original = TrainingModule.training_step

    def training_step(self: TrainingModule, *arguments: object) -> torch.Tensor:
        # The last steps wait for a test that comes late to its signal.
        pause_s = 0.03 if self.global_step < 6 or self.trainer.max_steps > STEPS else 1
        time.sleep(pause_s if self.global_rank == 1 else 0.01)
        return original(self, *arguments)  # type: ignore[arg-type]

    TrainingModule.training_step = training_step  # type: ignore[method-assign,assignment]


def go_on(process: BaseProcess, folder: Path, *, until: str) -> list[psutil.Process]:
    ranks = wait_for_ranks(process, 2)
    wait_for_text(folder / "output.log", until)
    return ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    strategy: str, tmp_path: Path
) -> None:
    options = (*TWO, *NOT_VALIDATED, "--strategy", strategy)
    whole = train("gpt", tmp_path / "whole", *options)
    places = ("--checkpoint-dir", str(tmp_path / "kept"), "--resume", "auto")
    process = begin("gpt", tmp_path / "run", *options, *places, fault=slow_rank)
    go_on(process, tmp_path / "run", until="step  5/")
    os.kill(process.pid or 0, signal.SIGUSR1)
    process.join(PATIENCE_S)
    assert process.exitcode == STOPPED_EXIT_CODE
    record = load(tmp_path / "run")
    assert record["status"] == "preempted"
    done = len(record["loss"])
    assert 5 <= done < STEPS
    assert record["error"]["message"] == f"stopped by SIGUSR1 after step {done}"
    assert [path.name for path in list_checkpoints(tmp_path / "kept")] == [f"step-{done:08d}"]
    assert "to continue, add --resume to the command" in (tmp_path / "run/output.log").read_text()
    again = train("gpt", tmp_path / "run", *options, *places)
    assert again["status"] == "ok"
    assert again["segment_starts"] == [0, done]
    assert again["loss"] == whole["loss"]


def test_a_run_with_a_slow_rank_stops_after_each_of_many_signals_at_random_moments(
    is_whole_proof: bool, tmp_path: Path
) -> None:
    """Stops and resumes one run many times: by any signal, sent to one rank or to all, at any
    moment of a step, sometimes twice."""
    drawn = random.Random(0)
    sent = SENT_IN_PROOF if is_whole_proof else SENT
    steps = str(100 * sent)
    options = ("--devices", "2", "--batch-size", "4", "--max-steps", steps, "--log-every", "1")
    options += ("--validate-every", steps, "--resume", "auto")
    kept, last = tmp_path / "kept", 0
    for number in range(sent):
        folder = tmp_path / f"run-{number}"
        process = begin("gpt", folder, *options, "--checkpoint-dir", str(kept), fault=slow_rank)
        ranks = go_on(process, folder, until="| loss")
        time.sleep(drawn.uniform(0, 0.15))
        targets = drawn.choice(
            [[process.pid], [ranks[0].pid], [ranks[1].pid], [r.pid for r in ranks]]
        )
        for target in targets:
            os.kill(target or 0, drawn.choice(STOP_SIGNALS))
            time.sleep(drawn.choice((0, 0, 0.02)))
        process.join(PATIENCE_S)
        assert process.exitcode == STOPPED_EXIT_CODE, (
            f"{number}: {(folder / 'output.log').read_text()}"
        )
        newest = list_checkpoints(kept)[-1]
        step = int(newest.name.removeprefix("step-"))
        assert step > last
        last = step
    record = load(tmp_path / f"run-{sent - 1}")
    assert len(record["loss"]) == last
    assert len(record["segment_starts"]) == sent


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp1", "zero2"])
def test_a_run_killed_after_its_last_step_is_completed_when_resumed(
    strategy: str, tmp_path: Path
) -> None:
    options = ("--devices", "2", "--batch-size", "4", "--strategy", strategy, "--resume", "auto")
    whole = train("gpt", tmp_path / "run", *options, "--checkpoint-dir", str(tmp_path / "kept"))
    (tmp_path / "run/record.json").unlink()
    again = train("gpt", tmp_path / "run", *options, "--checkpoint-dir", str(tmp_path / "kept"))
    assert again["status"] == "ok"
    assert again["loss"] == whole["loss"]
    assert again["validation"]["loss"] == pytest.approx(whole["validation"]["loss"], rel=1e-6)
    # Once more: its record says that it is finished.
    written = (tmp_path / "run/record.json").read_bytes()
    train("gpt", tmp_path / "run", *options, "--checkpoint-dir", str(tmp_path / "kept"))
    assert (tmp_path / "run/record.json").read_bytes() == written
    assert "done already" in (tmp_path / "run/rank-0.log").read_text()


def test_a_run_never_resumes_from_the_checkpoint_of_another_run(tmp_path: Path) -> None:
    options = ("--resume", "auto", "--checkpoint-dir", str(tmp_path / "kept"))
    train("gpt", tmp_path / "one", *options)
    kept = [path.name for path in list_checkpoints(tmp_path / "kept")]
    process = begin("gpt", tmp_path / "other", *options, "--seed", "1")
    process.join(PATIENCE_S)
    assert process.exitcode == 2
    said = (tmp_path / "other/output.log").read_text()
    assert "is of another run: seed is 0 there and 1 here" in said
    assert [path.name for path in list_checkpoints(tmp_path / "kept")] == kept


def lose_on_rank_1() -> None:
    """A fault: the loss of rank 1 is NaN in step 4, and with it that of all ranks in step 5."""
    forward, calls = Objective.forward, itertools.count(1)

    def compute(self: Objective, batch: Batch) -> Tensor:
        loss = forward(self, batch)
        is_lost = next(calls) == 4 and os.environ["RANK"] == "1"
        return loss * math.nan if is_lost else loss

    Objective.forward = compute  # type: ignore[method-assign]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_stop_within_one_log_interval_of_a_nan_loss_on_one(
    strategy: str, tmp_path: Path
) -> None:
    options = ("--devices", "2", "--batch-size", "4", "--strategy", strategy, "--no-checkpoint")
    options += ("--max-steps", "100000", "--validate-every", "100000", "--log-every", "5")
    process = begin("gpt", tmp_path / "run", *options, fault=lose_on_rank_1)
    process.join(PATIENCE_S)
    assert process.exitcode == 1
    record = load(tmp_path / "run")
    assert (record["status"], len(record["loss"])) == ("diverged", 3)
    assert len(record["hardware"]) == 2, "the record has the readings of both ranks"
    *said, error = (tmp_path / "run/output.log").read_text().splitlines()
    assert "loss is nan at step 4; lower optimizer.learning-rate and start again (record: " in error
    last = [line for line in said if line.startswith("step")][-1]
    assert last.startswith("step      5/100000 | loss      nan")
