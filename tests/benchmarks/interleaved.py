"""Compares whole recipes that run their steps in turns, one step each.

Other load on the machine then affects all of them alike. Ratios between them are meaningful; their
times are not comparable with those of other machines.
"""

import ctypes
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch

import unitransformer.run
from recipes.command_line import configure
from tests.distributed.forking import fork_command
from tests.distributed.launching import RECIPES, begin, environment, load, recipe_arguments
from unitransformer.config import RunConfig
from unitransformer.stats.intervals import describe

WARM_UP = 10  # steps that are not compared
ROUNDS = 4  # at most, each with new launches
LIMIT_S = 500  # of the steps of the other arms
ROUND_LIMIT_S = 3600
Verdict = Literal["within", "above", "open"]
Clock = Literal["processor", "wall"]
Taken = Mapping[str, Mapping[Clock, list[float]]]  # seconds of every step, by arm


def do_nothing() -> None:
    """The fault of an arm without a fault."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant of the recipe that is compared.

    With `train`, the arm trains by this function in place of the recipe, and returns the losses;
    then those of all arms must be equal bit for bit.
    """

    recipe: str = "gpt"
    options: Sequence[str] = ()
    train: "Callable[[RunConfig, InterleavesSteps], list[float]] | None" = None
    fault: Callable[[], None] = do_nothing
    waits: float = 0.0  # above 0: a control, which sleeps for this share of a whole step
    wait_s: float = 0.0


class InterleavesSteps(pl.Callback):
    """Runs one step, then lets the next arm run. Must be the last callback, to time whole steps."""

    def __init__(self, semaphores: Sequence[Any], index: int, path: Path, wait_s: float) -> None:
        self.semaphores, self.index, self.path, self.wait_s = semaphores, index, path, wait_s
        self.taken_s: dict[Clock, list[float]] = {"processor": [], "wall": []}
        self._start_s = dict[Clock, float]()

    def on_train_start(self, *arguments: Any) -> None:
        self.begin_step()

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self.end_step()
        if trainer.global_step < trainer.max_steps:
            self.begin_step()
        else:
            self.write()

    def begin_step(self) -> None:
        assert self.semaphores[self.index].acquire(timeout=LIMIT_S)
        self._start_s = _now()

    def end_step(self) -> None:
        time.sleep(self.wait_s)
        for clock, now_s in _now().items():
            self.taken_s[clock].append(now_s - self._start_s[clock])
        self.semaphores[(self.index + 1) % len(self.semaphores)].release()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.taken_s))


def _now() -> dict[Clock, float]:
    return {"processor": time.process_time(), "wall": time.perf_counter()}


def run_interleaved(folder: Path, arms: Mapping[str, Arm], options: Sequence[str]) -> Taken:
    """Runs all arms step by step in turns; returns the seconds of every step of every arm.

    Processor time excludes waiting and other processes. Wall time is that of the arm's turn.
    """
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    semaphores = [context.Semaphore(0) for _ in arms]
    processes = [
        _begin(
            arm,
            folder / name,
            [*options, *arm.options],
            InterleavesSteps(semaphores, index, folder / f"{name}.json", arm.wait_s),
        )
        for index, (name, arm) in enumerate(arms.items())
    ]
    try:
        semaphores[0].release()
        for process in processes:
            process.join(ROUND_LIMIT_S)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * len(arms)
    if any(arm.train is not None for arm in arms.values()):
        losses = [load(folder / name)["loss"] for name in arms]
        assert all(other == losses[0] for other in losses)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in arms}


def _begin(arm: Arm, folder: Path, options: Sequence[str], turns: InterleavesSteps) -> BaseProcess:
    train = arm.train
    if train is None:
        fault = _interleave(arm.fault, turns)
        return begin(arm.recipe, folder, *options, fault=fault, is_whole=True)
    arguments = recipe_arguments(arm.recipe, folder, *options)
    folder.mkdir()

    def command() -> int:
        keep_memory()
        config, _ = configure(RECIPES[arm.recipe].PRESET, arguments)
        losses = train(config, turns)
        turns.write()
        (folder / "record.json").write_text(json.dumps({"loss": losses}))
        return 0

    log, variables = folder / "output.log", environment(folder.parent)
    return fork_command(command, log=log, variables=variables, is_whole=True)


def judge(rounds: Sequence[Sequence[float]], most: float) -> Verdict:
    """Whether the added seconds per step are at most `most`, by 95 % intervals of their median.

    "within": the interval over all rounds lies below `most`. "above": the intervals of two single
    rounds lie above it, since one launch may be slow by chance. "open": neither.
    """
    high = describe([added for added_s in rounds for added in added_s]).high
    if high is not None and high <= most:
        return "within"
    lows = [describe(added_s).low for added_s in rounds]
    return "above" if sum(low is not None and low > most for low in lows) >= 2 else "open"


def check(
    folder: Path,
    arms: Mapping[str, Arm],
    options: Sequence[str],
    batch_size: int,
    allowed: Mapping[str, float],
    *,
    clocks: Sequence[Clock] = ("processor",),
) -> None:
    """Asserts that no arm adds more than its allowed share of a step, by any of the clocks.

    Measures further rounds until every arm is decided. A control must exceed its share. Fails if an
    arm is refuted; skips if it stays undecided.

    The added time does not depend on the batch size: it is measured in many short steps, and
    related to the time of a step of `batch_size`.
    """
    first = next(iter(arms))
    whole = (*options, "--batch-size", str(batch_size), "--max-steps", "3")
    taken = run_interleaved(folder / "whole", {first: arms[first]}, whole)[first]
    step_s = {clock: statistics.median(taken[clock]) for clock in clocks}
    arms = {name: replace(arm, wait_s=arm.waits * step_s[clocks[-1]]) for name, arm in arms.items()}
    questions = [
        Question(arm=name, clock=clock, step_s=step_s[clock], allowed=share)
        for name, share in allowed.items()
        for clock in clocks
        if clock == clocks[-1] or not arms[name].waits  # waiting takes no processor time
    ]
    for number in range(1, ROUNDS + 1):
        left = {q.arm for q in questions if q.verdict == "open"}
        running = {name: arm for name, arm in arms.items() if name == first or name in left}
        taken_s = run_interleaved(folder / f"round {number}", running, options)
        for question in questions:
            if question.verdict == "open":
                question.add_round(taken_s[first], taken_s[question.arm])
                print(question.summary())
        if not any(question.verdict == "open" for question in questions):
            break
    for question in questions:
        refuted = "within" if arms[question.arm].waits else "above"
        assert question.verdict != refuted, question.summary()
    if undecided := [question.summary() for question in questions if question.verdict == "open"]:
        pytest.skip(f"inconclusive, neither shown nor refuted: {'; '.join(undecided)}")


@dataclass(kw_only=True)
class Question:
    """Whether an arm adds at most its share of a step, by one clock."""

    arm: str
    clock: Clock
    step_s: float
    allowed: float
    rounds: list[list[float]] = field(default_factory=list)

    def add_round(
        self, first: Mapping[Clock, list[float]], arm: Mapping[Clock, list[float]]
    ) -> None:
        pairs = list(zip(first[self.clock], arm[self.clock], strict=True))[WARM_UP:]
        self.rounds.append([b - a for a, b in pairs])

    @property
    def verdict(self) -> Verdict:
        return judge(self.rounds, self.allowed * self.step_s) if self.rounds else "open"

    def summary(self) -> str:
        added = describe([value for added_s in self.rounds for value in added_s])
        ends = (added.low, added.high)
        shares = " to ".join("?" if s is None else f"{s / self.step_s:.2%}" for s in ends)
        return (
            f"{self.arm} adds {added.median / self.step_s:.2%} ({shares}, {added.count} pairs) to "
            f"{self.step_s:.2f} s of {self.clock} time, allowed {self.allowed:.1%}: {self.verdict}"
        )


def keep_memory() -> None:
    """Makes glibc keep freed memory.

    Page faults on memory that was returned and is used again differ between launches, by up to 20 %
    of the processor time. With memory kept, equal launches agree within 2 %.
    """
    if sys.platform == "linux":
        mmap_threshold, trim_threshold = -3, -1  # malloc.h
        for option, size in ((mmap_threshold, 2**30), (trim_threshold, 2**31 - 1)):
            assert ctypes.CDLL(None).mallopt(option, size)


def _interleave(fault: Callable[[], None], callback: InterleavesSteps) -> Callable[[], None]:
    def inject() -> None:
        fault()
        keep_memory()
        torch.set_num_threads(1)
        build_trainer = unitransformer.run.build_trainer

        def build(*arguments: Any, callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
            return build_trainer(*arguments, callbacks=[*callbacks, callback], **options)

        unitransformer.run.build_trainer = build

    return inject
