"""Whole recipes side by side that take turns, step by step: what else the machine does falls on all
of them alike. Times of other machines mean nothing here; the ratio of two of these does.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import unitransformer.run
from tests.distributed.launching import begin
from unitransformer.statistics.comparisons import paired_ratio
from unitransformer.statistics.intervals import Figures

WARM_UP = 10  # steps that are not compared
LIMIT_S = 500


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


def compare(folder: Path, arms: Mapping[str, Arm], options: Sequence[str]) -> dict[str, Figures]:
    """Processor time of a step of each arm over that of the first one, pair by pair.

    Processor time of one thread: waiting for another arm costs none, and neighbours that take the
    processor away are not in it.
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
    turns[0].release()
    for process in processes:
        process.join(LIMIT_S)
    assert [process.exitcode for process in processes] == [0] * len(arms)
    cpu_s = {name: json.loads((folder / f"{name}.json").read_text())[WARM_UP:] for name in arms}
    first, *others = arms
    return {name: paired_ratio(cpu_s[first], cpu_s[name]) for name in others}


def _in_turns(fault: Callable[[], None], callback: TakesTurns) -> Callable[[], None]:
    def planted() -> None:
        fault()
        torch.set_num_threads(1)
        build_trainer = unitransformer.run.build_trainer

        def build(*arguments: Any, callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
            return build_trainer(*arguments, callbacks=[*callbacks, callback], **options)

        unitransformer.run.build_trainer = build

    return planted


def check(
    folder: Path, arms: Mapping[str, Arm], options: Sequence[str], allowed: Mapping[str, float]
) -> None:
    """Fail if an arm is shown twice in a row to take more than is allowed of the first one's time.

    Shown: the whole 95 % interval lies above. What one measurement shows by chance, a second does
    not; and one on a machine too restless for an interval shows nothing.
    """
    refuted = set(allowed)
    for attempt in ("first", "again"):
        for name, ratio in compare(folder / attempt, arms, options).items():
            ends = ratio.reason or f"{ratio.low:.4f} to {ratio.high:.4f}"
            print(f"{name}: {ratio.median:.4f} ({ends}; {ratio.count} pairs)")
            if ratio.low is None or ratio.low <= allowed[name]:
                refuted.discard(name)
        if not refuted:
            return
    raise AssertionError(f"{', '.join(sorted(refuted))}: twice above what is allowed, {allowed}")
