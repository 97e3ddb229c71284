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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch

import unitransformer.run
from tests.distributed.launching import begin
from unitransformer.statistics.intervals import describe

WARM_UP = 10  # steps that are not compared
ROUNDS = 4  # at most, each with new launches
LIMIT_S = 500
Verdict = Literal["within", "above", "open"]


def do_nothing() -> None:
    """The fault of an arm that is as it is."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things that are compared."""

    options: Sequence[str] = ()
    fault: Callable[[], None] = do_nothing


class TakesTurns(pl.Callback):
    """Last of all callbacks: a step is everything from one of its calls to the next."""

    def __init__(self, turns: Sequence[Any], index: int, path: Path) -> None:
        self.turns, self.index, self.path = turns, index, path
        self.cpu_s: list[float] = []
        self._start_s = 0.0

    def on_train_start(self, *arguments: Any) -> None:
        self._wait()

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self.cpu_s.append(time.process_time() - self._start_s)
        self.turns[(self.index + 1) % len(self.turns)].release()
        if trainer.global_step < trainer.max_steps:
            self._wait()
        else:
            self.path.write_text(json.dumps(self.cpu_s))

    def _wait(self) -> None:
        assert self.turns[self.index].acquire(timeout=LIMIT_S)
        self._start_s = time.process_time()


def take_turns(
    folder: Path, arms: Mapping[str, Arm], options: Sequence[str]
) -> dict[str, list[float]]:
    """Processor time of each step of each arm, in the order they were taken.

    Of one thread: waiting for another arm costs none, and neighbours that take the processor away
    are not in it.
    """
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    turns = [context.Semaphore(0) for _ in arms]
    processes = [
        begin(
            *("gpt", folder / name, *options, *arm.options),
            fault=_in_turns(arm.fault, TakesTurns(turns, index, folder / f"{name}.json")),
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
) -> None:
    """Show that no arm adds more than its share of a step to the first one, in as many rounds as
    that takes. Fails where the contrary is shown; skips, as no proof, where neither is.

    What the arms add does not grow with the batch: it is measured in steps of `options`, so short
    that there is time for many, and is a share of a step of `batch_size`.
    """
    first = next(iter(arms))
    whole = (*options, "--batch-size", str(batch_size), "--max-steps", "5")
    step_s = statistics.median(take_turns(folder / "whole", {first: arms[first]}, whole)[first])
    rounds: dict[str, list[list[float]]] = {name: [] for name in allowed}
    verdicts: dict[str, Verdict] = dict.fromkeys(allowed, "open")
    for number in range(1, ROUNDS + 1):
        left = {name: arm for name, arm in arms.items() if verdicts.get(name, "open") == "open"}
        cpu_s = take_turns(folder / f"round {number}", left, options)
        for name in left.keys() - {first}:
            pairs = list(zip(cpu_s[first], cpu_s[name], strict=True))[WARM_UP:]
            rounds[name].append([b - a for a, b in pairs])
            verdicts[name] = judge(rounds[name], allowed[name] * step_s)
            print(_told(name, rounds[name], step_s, allowed[name], verdicts[name]))
        if "open" not in verdicts.values():
            break
    said = [
        _told(name, rounds[name], step_s, allowed[name], verdict)
        for name, verdict in verdicts.items()
        if verdict != "within"
    ]
    assert "above" not in verdicts.values(), "\n".join(said)
    if said:
        pytest.skip(f"inconclusive, neither shown nor refuted: {'; '.join(said)}")


def _told(
    name: str, rounds: Sequence[Sequence[float]], step_s: float, share: float, verdict: Verdict
) -> str:
    added = describe([value for own in rounds for value in own])
    ends = " to ".join("?" if s is None else f"{s / step_s:.2%}" for s in (added.low, added.high))
    return (
        f"{name} adds {added.median / step_s:.2%} ({ends}, {added.count} pairs) to a step of "
        f"{step_s:.2f} s, allowed {share:.1%}: {verdict}"
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
