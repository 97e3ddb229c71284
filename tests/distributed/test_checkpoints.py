"""Checkpoints resume under any strategy, are consistent, and survive the death of their writer."""

import errno
import functools
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import begin, load, train
from tests.processes import PATIENCE_S, wait_until_ended
from unitransformer import export
from unitransformer.checkpoint import writer
from unitransformer.checkpoint.names import checkpoint_name
from unitransformer.checkpoint.reader import (
    CheckpointReader,
    check_files,
    list_checkpoints,
    newest_checkpoint,
    read_run_state,
)
from unitransformer.checkpoint.writer import CheckpointWriter
from unitransformer.data.sampler import TrainSampler
from unitransformer.launch.variables import LOCAL_DISK
from unitransformer.training.module import TrainingModule

# A learning rate so large that a lost optimizer moment or step shows.
LARGE_STEPS = ("--optimizer.learning-rate", "3e-3", "--optimizer.warmup-steps", "1")
Leg = tuple[str, int, int, int]  # strategy, devices, last step, micro-batches per step


def leg(strategy: str, devices: int, last: int, accumulate: int = 1) -> tuple[str, ...]:
    """Options of a run to step `last` with a global batch of 8."""
    return (
        *("--strategy", strategy, "--devices", str(devices), "--max-steps", str(last)),
        *("--batch-size", str(8 // devices // accumulate), "--accumulate", str(accumulate)),
        *LARGE_STEPS,
    )


def places(folder: Path) -> tuple[str, ...]:
    return ("--checkpoint-dir", str(folder / "checkpoints"))


def assert_same(record: dict[str, Any], reference: dict[str, Any]) -> None:
    assert record["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert record["gradient_norm"] == pytest.approx(reference["gradient_norm"], rel=1e-4)
    measured, expected = (r["validation"]["loss"] for r in (record, reference))
    assert measured == pytest.approx(expected, rel=1e-5)


# ---- another strategy, another number of ranks


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The record of five uninterrupted steps of one process."""
    return functools.cache(
        lambda *model: train(
            "gpt", tmp_path_factory.mktemp("whole") / "run", *leg("single", 1, 5), *model
        )
    )


# Neither divides by two or four.
UNEVEN = ("--model.num-classes", "301", "--model.feedforward-width", "33")


@pytest.mark.parametrize(
    ("legs", "model"),
    [
        ([("fsdp", 2, 1, 1), ("ddp", 4, 2, 2), ("zero2", 1, 3, 2), ("zero1", 2, 5, 1)], ()),
        ([("fsdp", 4, 1, 1), ("zero3", 2, 2, 2), ("fsdp1", 4, 3, 1), ("single", 1, 5, 1)], UNEVEN),
        (
            [("fsdp1", 2, 2, 2), ("hsdp", 2, 3, 1), ("zero3", 2, 4, 1), ("fsdp1", 2, 5, 1)],
            ("--model.tied-head", "true"),
        ),
    ],
    ids=lambda value: " ".join(name for name, *_ in value) if isinstance(value, list) else "",
)
def test_a_run_resumes_under_other_strategies_and_device_counts(
    legs: list[Leg], model: tuple[str, ...], whole: Any, tmp_path: Path
) -> None:
    for number, options in enumerate(legs):
        resume = ("--resume",) if number else ()
        run = (*leg(*options), *model, *places(tmp_path), *resume)
        record = train("gpt", tmp_path / str(number), *run)
    assert record["segment_starts"] == [0, *(last for _, _, last, _ in legs[:-1])]
    assert_same(record, whole(*model))


# ---- checkpoints written during training


def keep_aside(folder: Path, *, delay_s: float = 0.0) -> Callable[[], None]:
    """A fault: shards are written late, and each checkpoint is copied before it is deleted."""

    def fault() -> None:
        write_data, finish = CheckpointWriter.write_data, CheckpointWriter.finish

        def write_late(self: CheckpointWriter, plan: Any, planner: Any) -> Any:
            time.sleep(delay_s)
            return write_data(self, plan, planner)

        def copy(self: CheckpointWriter, metadata: Any, results: Any) -> None:
            finish(self, metadata, results)
            shutil.copytree(self.final, folder / self.final.name)

        CheckpointWriter.write_data, CheckpointWriter.finish = write_late, copy  # type: ignore[method-assign]

    return fault


@pytest.mark.parametrize(
    ("strategy", "precision", "accumulate"),
    [
        ("single", "32-true", 1),
        ("ddp", "32-true", 2),
        ("fsdp", "bf16-true", 1),
        ("fsdp", "bf16-mixed", 2),
        ("fsdp1", "bf16-mixed", 1),
        ("zero2", "bf16-mixed", 2),  # computes with rounded weights, steps whole ones
        ("zero3", "bf16-mixed", 1),
    ],
)
def test_a_checkpoint_taken_during_training_equals_its_step_bit_for_bit(
    strategy: str, precision: str, accumulate: int, tmp_path: Path
) -> None:
    devices = 1 if strategy == "single" else 2
    options = (*leg(strategy, devices, 6, accumulate), "--precision", precision)
    kept = tmp_path / "checkpoints"
    kept.mkdir()
    process = begin(
        "gpt",
        tmp_path / "whole",
        *options,
        *("--checkpoint-every", "2"),
        fault=keep_aside(kept, delay_s=0.1),  # steps 3 and 4 take less
    )
    process.join(PATIENCE_S)
    assert process.exitcode == 0, (tmp_path / "whole" / "output.log").read_text()
    assert [path.name for path in list_checkpoints(kept)] == [checkpoint_name(n) for n in (2, 4, 6)]
    shutil.rmtree(kept / checkpoint_name(6))
    shutil.rmtree(kept / checkpoint_name(4))
    rest = train("gpt", tmp_path / "rest", *options, *places(tmp_path), "--resume")
    record = load(tmp_path / "whole")
    assert rest["segment_starts"] == [0, 2]
    assert rest["loss"] == record["loss"]
    assert rest["gradient_norm"] == record["gradient_norm"]
    assert rest["validation"]["loss"] == record["validation"]["loss"]


# ---- what each rank writes


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp1", "zero3"])
def test_every_rank_writes_its_shard(strategy: str, tmp_path: Path) -> None:
    record = train("gpt", tmp_path / "run", *leg(strategy, 2, 1), *WIDE, *places(tmp_path))
    assert_shared(tmp_path / "checkpoints", ranks=2, num_parameters=record["num_parameters"])


def test_replicated_tensors_are_written_once(tmp_path: Path) -> None:
    two_nodes = (*leg("hsdp", 2, 1), "--num-nodes", "2", "--batch-size", "2")
    record = train("gpt", tmp_path / "run", *two_nodes, *WIDE, *places(tmp_path))
    assert_shared(tmp_path / "checkpoints", ranks=4, num_parameters=record["num_parameters"])


WIDE = ("--model.width", "64", "--model.feedforward-width", "256")


def assert_shared(folder: Path, *, ranks: int, num_parameters: int) -> None:
    """The newest checkpoint has equal shards and holds every number once."""
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    check_files(checkpoint)
    sizes = [path.stat().st_size for path in checkpoint.glob("*.distcp")]
    num_bytes = 3 * 4 * num_parameters  # weights and two moments, float32
    assert len(sizes) == ranks
    assert num_bytes < sum(sizes) < 1.4 * num_bytes  # each tensor has a header
    assert min(sizes) > 0.8 * max(sizes)
    tensors = CheckpointReader(checkpoint).metadata.state_dict_metadata.values()
    assert sum(tensor.size.numel() for tensor in tensors) == 3 * num_parameters


# ---- weights from a file


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Weights after three steps and the record of the fourth step, by model options."""

    @functools.cache
    def export_with(*model: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("exported")
        train("gpt", folder / "first", *leg("single", 1, 3), *model, *places(folder))
        path = folder / "weights.safetensors"
        assert export.main([str(folder / "checkpoints"), str(path)]) == 0
        rest = (*leg("single", 1, 4), *model, *places(folder), "--resume")
        return path, train("gpt", folder / "rest", *rest)

    return export_with


@pytest.mark.parametrize(
    ("strategy", "precision", "is_tied"),
    [
        *((name, "32-true", False) for name in ("single", "ddp", "fsdp", "fsdp1", "zero3")),
        *((name, "32-true", True) for name in ("fsdp", "zero3")),
        ("zero2", "bf16-mixed", False),
    ],
)
def test_a_run_that_begins_with_exported_weights_has_the_loss_of_the_next_step(
    strategy: str,
    precision: str,
    is_tied: bool,
    exported: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ("--model.tied-head", str(is_tied).lower())
    path, following = exported(*model)
    in_order = TrainSampler.__iter__

    def from_the_fourth(self: TrainSampler) -> Any:
        self.config = replace(self.config, max_steps=self.config.max_steps + 3)
        self.start_step = 3
        return in_order(self)

    monkeypatch.setattr(TrainSampler, "__iter__", from_the_fourth)
    devices = 1 if strategy == "single" else 2
    options = (*leg(strategy, devices, 1), "--optimizer.learning-rate", "0", *model)
    begins = ("--init-from", str(path), "--precision", precision)
    record = train("gpt", tmp_path / "run", *options, *begins, *places(tmp_path))
    rel = {"single": 0.0, "zero2": 1e-3}.get(strategy, 1e-6)
    assert record["loss"] == pytest.approx(following["loss"][3:], rel=rel, abs=0.0)
    assert record["gradient_norm"] == pytest.approx(following["gradient_norm"][3:], rel=10 * rel)
    # Without training, the same weights are exported, bit for bit.
    again = tmp_path / "again.safetensors"
    assert export.main([str(tmp_path / "checkpoints"), str(again)]) == 0
    before, after = load_file(path), load_file(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---- what goes wrong


def test_a_shard_damaged_for_one_rank_is_one_error_line_for_all(tmp_path: Path) -> None:
    train("gpt", tmp_path / "first", *leg("fsdp", 2, 1), *places(tmp_path))
    checkpoint = tmp_path / "checkpoints" / checkpoint_name(1)
    part = checkpoint / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-1])
    process = begin("gpt", tmp_path / "second", *leg("fsdp", 2, 2), *places(tmp_path), "--resume")
    process.join(PATIENCE_S)
    assert process.exitcode == 2
    said = (tmp_path / "second" / "output.log").read_text().splitlines()
    assert [line for line in said if "error" in line] == [
        f"error: checkpoint {checkpoint} is damaged (__1_0.distcp does not match its checksum); "
        "delete it and start again without --resume"
    ]


def fail_to_write(step: int) -> Callable[[], None]:
    """A fault: the disk of rank 1 is full at `step`."""

    def fault() -> None:
        write_data = CheckpointWriter.write_data

        def write(self: CheckpointWriter, plan: Any, planner: Any) -> Any:
            if self.final.name == checkpoint_name(step) and os.environ["RANK"] == "1":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_data(self, plan, planner)

        CheckpointWriter.write_data = write  # type: ignore[method-assign]

    return fault


@pytest.mark.parametrize("every", ["0", "2"])
def test_a_disk_full_for_one_rank_ends_all_ranks_and_leaves_the_previous_checkpoint(
    every: str, tmp_path: Path
) -> None:
    train("gpt", tmp_path / "first", *leg("fsdp", 2, 2), *places(tmp_path))
    process = begin(
        "gpt",
        tmp_path / "second",
        *(*leg("fsdp", 2, 4 if every == "0" else 8), *places(tmp_path), "--resume"),
        *("--checkpoint-every", every),
        fault=fail_to_write(4),
    )
    process.join(PATIENCE_S)
    assert process.exitcode == 1
    (said,) = (
        line
        for line in (tmp_path / "second" / "output.log").read_text().splitlines()
        if "error" in line
    )
    reason = f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}"
    assert (
        f"checkpoint-dir {tmp_path / 'checkpoints'}: step 4 could not be saved ({reason}); "
        f"{checkpoint_name(2)} is kept; free space and run again with --resume"
    ) in said
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == [checkpoint_name(2)]
    check_files(tmp_path / "checkpoints" / checkpoint_name(2))
    record = load(tmp_path / "second")
    assert (record["status"], record["error"]["type"]) == ("crashed", "CheckpointError")


@pytest.mark.parametrize(("strategy", "devices"), [("single", 1), ("fsdp", 2)])
def test_a_run_that_fails_while_it_saves_finishes_the_checkpoint(
    strategy: str, devices: int, tmp_path: Path
) -> None:
    def fault() -> None:
        keep_aside(tmp_path / "aside", delay_s=0.5)()
        training_step = TrainingModule.training_step

        def fail(self: TrainingModule, *arguments: Any) -> Any:
            if self._num_micro_batches == 2:
                raise ArithmeticError("injected in step 3")
            return training_step(self, *arguments)

        TrainingModule.training_step = fail  # type: ignore[method-assign]

    options = (*leg(strategy, devices, 9), *places(tmp_path), "--checkpoint-every", "2")
    process = begin("gpt", tmp_path / "run", *options, fault=fault)
    process.join(PATIENCE_S)
    assert process.exitcode == 1
    assert "injected in step 3" in load(tmp_path / "run")["error"]["message"]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == [checkpoint_name(2)]
    check_files(tmp_path / "checkpoints" / checkpoint_name(2))


# ---- kill -9


@pytest.mark.parametrize(
    ("strategy", "devices", "numbers"),
    [
        ("single", 1, range(6)),
        ("fsdp", 2, range(3)),
        ("zero2", 2, range(3, 6)),
        pytest.param("single", 1, range(18), marks=pytest.mark.proof),
        pytest.param("fsdp", 2, range(6), marks=pytest.mark.proof),
        pytest.param("zero2", 2, range(6), marks=pytest.mark.proof),
    ],
)
def test_a_run_killed_while_saving_resumes_from_its_newest_complete_checkpoint(
    strategy: str, devices: int, numbers: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    folder = tmp_path / "checkpoints"
    fixed = (*LONG, *WIDE, *places(tmp_path), "--checkpoint-every", "1")
    step = 0
    for number in numbers:
        before = hidden(folder)
        cycle, phase = divmod(number, len(PHASES))
        if (cycle + phase) % 2:  # both kinds of kill in every phase, if there are two cycles
            monkeypatch.setenv(LOCAL_DISK, str(tmp_path / "disk"))
        else:
            monkeypatch.delenv(LOCAL_DISK, raising=False)
        resume = ("--resume",) if step else ()
        options = (*leg(strategy, devices, 1000), *fixed, *resume)
        process = begin("gpt", tmp_path / str(number), *options, fault=drag)
        wait_until(process, is_clean_of, folder, before)
        wait_until(process, newest_checkpoint, folder)  # the first run saves one whole
        stop_in(PHASES[phase], folder, process)
        kill(process, draw.randrange(devices))
        assert hidden(folder)
        assert newest_step(folder) >= step
        step = newest_step(folder)
    record = train("gpt", tmp_path / "rest", *leg(strategy, devices, step + 2), *fixed, "--resume")
    kept = [path.name for path in list_checkpoints(folder)]
    assert kept == [checkpoint_name(step + 1), checkpoint_name(step + 2)]
    whole = train("gpt", tmp_path / "whole", *leg("single", 1, step + 2), *LONG, *WIDE)
    assert_same(record, whole)


PHASES = (  # phases of saving, by the files that exist then
    ".*.old",
    ".*.partial",
    ".*.partial/__0_0.distcp",
    ".*.partial/.metadata",
    ".*.partial/run.json",
    ".*.partial/sums.json",
)
LONG = (
    *("--optimizer.schedule-steps", "1000", "--log-every", "1000"),
    *("--validate-every", "1000"),
)


def newest_step(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 if there is none."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return 0
    check_files(newest)
    actual = read_run_state(newest)
    assert newest.name == checkpoint_name(len(actual["loss"]))
    return len(actual["loss"])


def hidden(folder: Path) -> set[str]:
    """Checkpoints that are partly written or partly deleted."""
    return {path.name for path in folder.glob(".*")}


def is_clean_of(folder: Path, names: set[str]) -> bool:
    return not names & hidden(folder)


def is_in(folder: Path, phase: str) -> bool:
    return any(folder.glob(phase))


def wait_until(process: BaseProcess, is_so: Callable[..., bool], *values: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so(*values):
        assert process.exitcode is None
        assert time.monotonic() < deadline


def drag() -> None:
    """A fault: every phase of saving takes long enough to be interrupted."""
    for module, name in (
        (writer, "write_atomically"),
        (writer, "_fsync_folder"),
        (writer, "_remove_checkpoint"),
        (shutil, "rmtree"),
    ):
        setattr(module, name, functools.partial(after_a_while, getattr(module, name)))


def after_a_while(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    time.sleep(0.005)
    return function(*arguments, **keywords)


def stop_in(phase: str, folder: Path, process: BaseProcess) -> None:
    """Stops the first rank in a phase of saving."""
    wait_until(process, is_in, folder, phase)
    command = psutil.Process(process.pid)
    rank = min(command.children(), key=lambda child: child.pid, default=command)
    while True:
        wait_until(process, is_in, folder, phase)
        rank.suspend()
        wait_until(process, stands_still, rank)
        if is_in(folder, phase):
            return
        rank.resume()


def stands_still(rank: psutil.Process) -> bool:
    """Whether every thread of a process is stopped."""
    threads = Path(f"/proc/{rank.pid}/task").glob("*/stat")
    return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in threads)


def kill(process: BaseProcess, victim: int) -> None:
    """Kills one rank, then the command, with which the other ranks die."""
    assert process.exitcode is None
    ranks = psutil.Process(process.pid).children()
    if ranks[victim:]:
        ranks[victim].kill()
    process.kill()
    process.join()
    wait_until_ended(ranks)
