"""Whole recipes side by side that take turns, step by step: what else the machine does falls on all
of them alike. Times of other machines mean nothing here; the ratio of two of these does.
"""

import ctypes
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch

import unitransformer.run
from tests.distributed.launching import begin
from unitransformer.stats.intervals import describe

WARM_UP = 10  # steps that are not compared
ROUNDS = 4  # at most, each with new launches
LIMIT_S = 500
Verdict = Literal["within", "above", "open"]
Clock = Literal["processor", "wall"]
Taken = Mapping[str, Mapping[Clock, list[float]]]  # seconds of every step, by arm


def do_nothing() -> None:
    """The fault of an arm that is as it is."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things that are compared."""

    options: Sequence[str] = ()
    fault: Callable[[], None] = do_nothing
    waits: float = 0.0  # more than 0: a control that waits for such a share of a whole step
    wait_s: float = 0.0


class TakesTurns(pl.Callback):
    """Last of all callbacks: a step is everything from one of its calls to the next."""

    def __init__(self, turns: Sequence[Any], index: int, path: Path, wait_s: float) -> None:
        self.turns, self.index, self.path, self.wait_s = turns, index, path, wait_s
        self.taken_s: dict[Clock, list[float]] = {"processor": [], "wall": []}
        self._start_s = dict[Clock, float]()

    def on_train_start(self, *arguments: Any) -> None:
        self._wait()

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        time.sleep(self.wait_s)
        for clock, now_s in _now().items():
            self.taken_s[clock].append(now_s - self._start_s[clock])
        self.turns[(self.index + 1) % len(self.turns)].release()
        if trainer.global_step < trainer.max_steps:
            self._wait()
        else:
            self.path.write_text(json.dumps(self.taken_s))

    def _wait(self) -> None:
        assert self.turns[self.index].acquire(timeout=LIMIT_S)
        self._start_s = _now()


def _now() -> dict[Clock, float]:
    return {"processor": time.process_time(), "wall": time.perf_counter()}


def take_turns(folder: Path, arms: Mapping[str, Arm], options: Sequence[str]) -> Taken:
    """Seconds of each step of each arm, in the order they were taken.

    Processor time is that of one thread: waiting costs none, and neighbours that take the processor
    away are not in it. Wall time is that of the arm's own turn.
    """
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    turns = [context.Semaphore(0) for _ in arms]
    processes = [
        begin(
            *("gpt", folder / name, *options, *arm.options),
            fault=_in_turns(
                arm.fault, TakesTurns(turns, index, folder / f"{name}.json", arm.wait_s)
            ),
            is_whole=True,
        )
        for index, (name, arm) in enumerate(arms.items())
    ]
    try:
        turns[0].release()
        for process in processes:
            process.join(LIMIT_S)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * len(arms)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in arms}


def judge(rounds: Sequence[Sequence[float]], most: float) -> Verdict:
    """Whether what is added to a step is at most `most`, shown by 95 % intervals of its median.

    Within: that of all rounds together lies below as a whole. Above: those of two rounds, each by
    itself, lie above as a whole; what one launch shows by chance, a second does not.
    """
    high = describe([added for own in rounds for added in own]).high
    if high is not None and high <= most:
        return "within"
    lows = [describe(own).low for own in rounds]
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
    """Show that no arm adds more than its share of a step to the first one, by any of the clocks,
    in as many rounds as that takes; and that a control does. Fails where the contrary is shown;
    skips, as no proof, where neither is.

    What the arms add does not grow with the batch: it is measured in steps of `options`, so short
    that there is time for many, and is a share of a step of `batch_size`.
    """
    first = next(iter(arms))
    whole = (*options, "--batch-size", str(batch_size), "--max-steps", "5")
    taken = take_turns(folder / "whole", {first: arms[first]}, whole)[first]
    step_s = {clock: statistics.median(taken[clock]) for clock in clocks}
    arms = {name: replace(arm, wait_s=arm.waits * step_s[clocks[-1]]) for name, arm in arms.items()}
    questions = [
        Question(arm=name, clock=clock, step_s=step_s[clock], allowed=share)
        for name, share in allowed.items()
        for clock in clocks
        if clock == clocks[-1] or not arms[name].waits  # waiting takes no processor
    ]
    for number in range(1, ROUNDS + 1):
        left = {q.arm for q in questions if q.verdict == "open"}
        own = {name: arm for name, arm in arms.items() if name == first or name in left}
        taken_s = take_turns(folder / f"round {number}", own, options)
        for question in questions:
            if question.verdict == "open":
                question.hear(taken_s[first], taken_s[question.arm])
                print(question.told())
        if not any(question.verdict == "open" for question in questions):
            break
    for question in questions:
        refuted = "within" if arms[question.arm].waits else "above"
        assert question.verdict != refuted, question.told()
    if said := [question.told() for question in questions if question.verdict == "open"]:
        pytest.skip(f"inconclusive, neither shown nor refuted: {'; '.join(said)}")


@dataclass(kw_only=True)
class Question:
    """Whether an arm adds at most its share of a step, by one clock."""

    arm: str
    clock: Clock
    step_s: float
    allowed: float
    rounds: list[list[float]] = field(default_factory=list)

    def hear(self, first: Mapping[Clock, list[float]], own: Mapping[Clock, list[float]]) -> None:
        pairs = list(zip(first[self.clock], own[self.clock], strict=True))[WARM_UP:]
        self.rounds.append([b - a for a, b in pairs])

    @property
    def verdict(self) -> Verdict:
        return judge(self.rounds, self.allowed * self.step_s) if self.rounds else "open"

    def told(self) -> str:
        added = describe([value for own in self.rounds for value in own])
        ends = (added.low, added.high)
        shares = " to ".join("?" if s is None else f"{s / self.step_s:.2%}" for s in ends)
        return (
            f"{self.arm} adds {added.median / self.step_s:.2%} ({shares}, {added.count} pairs) to "
            f"{self.step_s:.2f} s of {self.clock} time, allowed {self.allowed:.1%}: {self.verdict}"
        )


def keep_memory() -> None:
    """Give no freed memory back to the system, where the C library is glibc.

    What is given back and faulted in again differs from launch to launch, and equal launches by
    20 % with it (5 % of a step's processor time and more); kept, they agree within 2 %.
    """
    if sys.platform == "linux":
        mmap_threshold, trim_threshold = -3, -1  # malloc.h
        for option, size in ((mmap_threshold, 2**30), (trim_threshold, 2**31 - 1)):
            assert ctypes.CDLL(None).mallopt(option, size)


def _in_turns(fault: Callable[[], None], callback: TakesTurns) -> Callable[[], None]:
    def planted() -> None:
        fault()
        keep_memory()
        torch.set_num_threads(1)
        build_trainer = unitransformer.run.build_trainer

        def build(*arguments: Any, callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
            return build_trainer(*arguments, callbacks=[*callbacks, callback], **options)

        unitransformer.run.build_trainer = build

    return planted
