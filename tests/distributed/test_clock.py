"""The step clock attributes an injected delay to the part of the step that has it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import GradBucket, Work
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

import unitransformer.run
from tests.distributed.launching import begin, load
from tests.processes import PATIENCE_S
from unitransformer.checkpoint.callbacks import SaveCheckpoints
from unitransformer.data.datamodule import DataModule
from unitransformer.measure import clock
from unitransformer.measure.clock import StepClock, StepTimes
from unitransformer.measure.communication import TimeGradientReduction
from unitransformer.training.module import TrainingModule

STEPS = 4
OPTIONS = ("--max-steps", str(STEPS), "--validate-every", str(STEPS), "--log-every", str(STEPS))
TWO = ("--devices", "2", "--batch-size", "2")
# The delays differ by more than a step without them takes.
LOADER_S, COLLECTIVE_S, OPTIMIZER_S, FORWARD_S = 0.1, 0.1, 0.15, 0.2
LEAST_S = 0.1


def run(folder: Path, *options: str, fault: Callable[[], None] | None = None) -> dict[str, Any]:
    process = begin("gpt", folder, *OPTIONS, *options, fault=fault)
    process.join(PATIENCE_S)
    assert process.exitcode == 0, (folder / "output.log").read_text()[-2000:]
    return load(folder)


def sleep_around(owner: Any, name: str, seconds: float) -> None:
    method = getattr(owner, name)

    def slow(*arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options)
        time.sleep(seconds)
        return result

    setattr(owner, name, slow)


def slow_parts() -> None:
    sleep_around(DataModule, "transfer_batch_to_device", LOADER_S)
    sleep_around(TrainingModule, "training_step", FORWARD_S)
    sleep_around(TrainingModule, "optimizer_step", OPTIMIZER_S)


def slow_collective() -> None:
    """Delays the first collective that each step waits for: in Python, or in DDP, in C++."""
    begins = False
    step, wait, wrap = TrainingModule.training_step, Work.wait, DistributedDataParallel.__init__

    def begin_step(*arguments: Any) -> Any:
        nonlocal begins
        begins = True
        return step(*arguments)

    def wait_longer(*arguments: Any) -> Any:
        nonlocal begins
        if begins:
            begins = False
            time.sleep(COLLECTIVE_S)
        return wait(*arguments)

    def reduce_slowly(state: Any, bucket: GradBucket) -> Future[Tensor]:
        reduced = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        finished: Future[Tensor] = Future()

        # In a thread, because the callback of a future may run inside of the backward pass.
        def finish() -> None:
            (total,) = reduced.wait()
            time.sleep(COLLECTIVE_S if bucket.is_last() else 0)
            finished.set_result(total / torch.distributed.get_world_size())

        threading.Thread(target=finish).start()
        return finished

    def wrap_slowly(self: Any, *arguments: Any, **options: Any) -> None:
        wrap(self, *arguments, **options)
        self.register_comm_hook(None, reduce_slowly)

    TrainingModule.training_step = begin_step  # type: ignore[method-assign]
    Work.wait = wait_longer  # type: ignore[method-assign]
    DistributedDataParallel.__init__ = wrap_slowly  # type: ignore[method-assign]


def slow_everything() -> None:
    slow_collective()
    slow_parts()


def unwatched() -> None:
    @contextlib.contextmanager
    def nothing(*arguments: Any) -> Iterator[None]:
        yield

    unitransformer.run.timed_waits = nothing
    TimeGradientReduction.on_before_backward = lambda *arguments: None  # type: ignore[assignment, method-assign]


def least(record: dict[str, Any], part: str) -> float:
    """The minimum over the steps but the first, as other processes make some of them longer."""
    seconds: list[float] = record["samples"][part][1:]
    return min(seconds)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_delay_injected_into_one_part_of_a_step_shows_in_that_part(
    accumulate: int, tmp_path: Path
) -> None:
    options = ("--accumulate", str(accumulate), "--devices", "1", "--strategy", "single")
    record = run(tmp_path / "run", *options, fault=slow_parts)
    injected = {"data_s": accumulate * LOADER_S, "forward_backward_s": accumulate * FORWARD_S}
    for part, seconds in (injected | {"optimizer_s": OPTIMIZER_S}).items():
        assert seconds <= least(record, part) < seconds + LEAST_S, part
    assert set(record["samples"]["communication_s"]) == {0.0}


@pytest.mark.parametrize(
    ("strategy", "accumulate"), [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("zero2", 1)]
)
def test_a_slow_collective_counts_as_communication_only(
    strategy: str, accumulate: int, tmp_path: Path
) -> None:
    options = (*TWO, "--strategy", strategy, "--accumulate", str(accumulate))
    record = run(tmp_path / "run", *options, fault=slow_everything)
    injected = {
        "data_s": accumulate * LOADER_S,
        "forward_backward_s": accumulate * FORWARD_S,
        "optimizer_s": OPTIMIZER_S,
        "communication_s": COLLECTIVE_S,
        "min_communication_s": COLLECTIVE_S,
    }
    for part, seconds in injected.items():
        # A rank may begin its wait after a delay in another thread or rank began.
        shortest = seconds / 2 if part.endswith("communication_s") else seconds
        assert shortest <= least(record, part) < seconds + LEAST_S, part
    samples = record["samples"]
    parts = [samples[part] for part in [*injected][:4]]
    assert [sum(step) for step in zip(*parts, strict=True)] == pytest.approx(record["step_s"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_measuring_communication_changes_no_loss(strategy: str, tmp_path: Path) -> None:
    spread = (*TWO, "--strategy", strategy)
    watched = run(tmp_path / "watched", *spread)
    assert min(watched["samples"]["communication_s"]) > 0
    alone = run(tmp_path / "unwatched", *spread, fault=unwatched)
    assert set(alone["samples"]["communication_s"]) == {0.0}
    assert watched["loss"] == alone["loss"]


def test_time_between_steps_is_recorded_without_validation(tmp_path: Path) -> None:
    def slow() -> None:
        sleep_around(SaveCheckpoints, "on_train_batch_end", LOADER_S)
        sleep_around(TrainingModule, "validation_step", 4 * LOADER_S)

    kept = ("--checkpoint-dir", str(tmp_path / "kept"), "--checkpoint-every", "100")
    record = run(tmp_path / "run", *kept, "--validate-every", "2", fault=slow)
    between_s = record["samples"]["between_steps_s"]
    assert between_s[0] is None, "there is no step before the first"
    assert LOADER_S <= min(between_s[1:])
    assert between_s[2] < 4 * LOADER_S, "it holds a validation"
    assert min(record["step_s"][1:]) < LOADER_S


def crash(folder: Path, *options: str, fault: Callable[[], None]) -> dict[str, Any]:
    process = begin("gpt", folder, *OPTIONS, *options, fault=fault)
    process.join(PATIENCE_S)
    assert process.exitcode == 1
    record = load(folder)
    assert (record["status"], record["error"]["type"]) == ("crashed", "ClockError")
    assert record["metrics"] == record["validation"] == {}
    assert record["tokens_per_s"] is None
    return record


def test_a_clock_that_runs_backwards_is_an_error_in_the_record(tmp_path: Path) -> None:
    def turn_back() -> None:
        stop, now, behind_s = StepClock.stop, time.perf_counter, 0.0

        def late_stop(self: StepClock) -> None:
            nonlocal behind_s
            behind_s += 100.0 if len(self.steps()) == 2 else 0.0
            stop(self)

        StepClock.stop = late_stop  # type: ignore[method-assign]
        clock.time = SimpleNamespace(  # type: ignore[assignment]
            perf_counter=lambda: now() - behind_s, process_time=time.process_time
        )

    record = crash(tmp_path / "run", "--devices", "1", "--strategy", "single", fault=turn_back)
    assert "step 3 has step_s -" in record["error"]["message"]
    assert "the clock went backwards" in record["error"]["message"]
    assert len(record["step_s"]) == len(record["loss"]) == 2
    assert min(record["step_s"]) > 0


def test_ranks_that_disagree_on_the_number_of_steps_are_an_error_in_the_record(
    tmp_path: Path,
) -> None:
    def forget_one() -> None:
        steps = StepClock.steps

        def all_but_one(self: StepClock) -> list[StepTimes]:
            actual = steps(self)
            return actual[torch.distributed.get_rank() :] if len(actual) == STEPS else actual

        StepClock.steps = all_but_one  # type: ignore[method-assign]

    record = crash(tmp_path / "run", *TWO, "--strategy", "ddp", fault=forget_one)
    actual = f"the ranks disagree on the number of steps (rank 0: {STEPS}, rank 1: {STEPS - 1})"
    assert record["error"]["message"] == actual
