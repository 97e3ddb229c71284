"""What a strategy costs on one device, where it has nothing to spread.

Whole recipes run side by side and take turns step by step, so that what else the machine does
falls on all of them alike. Times of other machines mean nothing here; their ratio does.
"""

import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import begin, load
from unitransformer.measure import ClockStarts

ALLOWED = {"ddp": 1.01, "fsdp": 1.02}
STEPS = 40
SHAPE = (
    *("--model.width", "128", "--model.num-layers", "4", "--model.num-heads", "4"),
    *("--model.feedforward-width", "512", "--model.num-positions", "128"),
    *("--model.num-classes", "1000", "--data", "synthetic", "--batch-size", "64"),
    *("--max-steps", str(STEPS), "--validate-every", str(STEPS), "--devices", "1"),
    *("--accelerator", "cpu"),
)


def take_turns(turns: list[Any], index: int) -> Callable[[], None]:
    """Let the clock of a step start when all others have done theirs."""

    def fault() -> None:
        start, end = ClockStarts.on_train_start, ClockStarts.on_train_batch_end

        def on_train_start(self: ClockStarts, *arguments: Any) -> None:
            assert turns[index].acquire(timeout=120)
            start(self, *arguments)

        def on_train_batch_end(self: ClockStarts, trainer: Any, *arguments: Any) -> None:
            turns[(index + 1) % len(turns)].release()
            if trainer.global_step < trainer.max_steps:
                assert turns[index].acquire(timeout=120)
            end(self, trainer, *arguments)

        ClockStarts.on_train_start = on_train_start  # type: ignore[method-assign]
        ClockStarts.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]

    return fault


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Lower end, median and upper end: the 95 % interval by order statistics (normal limit)."""
    ordered = sorted(values)
    half = 0.98 * len(values) ** 0.5
    low = max(0, round(len(values) / 2 - half))
    high = min(len(values) - 1, round(len(values) / 2 + half))
    return ordered[low], statistics.median(ordered), ordered[high]


def measure(folder: Path) -> dict[str, tuple[float, float, float]]:
    """How many times a step of `single` each strategy takes: interval and median."""
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    names = ["single", *ALLOWED]
    turns = [context.Semaphore(0) for _ in names]
    processes = [
        begin("gpt", folder / name, *SHAPE, "--strategy", name, fault=take_turns(turns, index))
        for index, name in enumerate(names)
    ]
    turns[0].release()
    for process in processes:
        process.join(500)
    assert [process.exitcode for process in processes] == [0] * len(names)
    cpu_s = {name: load(folder / name)["samples"]["cpu_s"][STEPS // 4 :] for name in names}
    return {
        name: median_interval(
            [own / plain for own, plain in zip(cpu_s[name], cpu_s["single"], strict=True)]
        )
        for name in ALLOWED
    }


@pytest.mark.xfail(
    strict=False,
    reason="not proven yet: at four layers of width 128 the intervals are 5 % wide, and fsdp's "
    "median was 1.06 (1.01 to 1.10) on two idle cores; ddp's 1.00 (0.96 to 1.05)",
)
def test_strategies_cost_next_to_nothing_on_one_device(tmp_path: Path) -> None:
    refuted = set(ALLOWED)
    for attempt in ("first", "again"):  # what one measurement refutes by chance, a second does not
        for name, (low, median, high) in measure(tmp_path / attempt).items():
            print(f"{name} / single: {median:.4f} ({low:.4f} to {high:.4f})")
            if low <= ALLOWED[name]:
                refuted.discard(name)
        if not refuted:
            return
    raise AssertionError(f"{', '.join(refuted)}: twice in a row above what is allowed, {ALLOWED}")
