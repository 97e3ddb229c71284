"""Tests sweeps of real processes: statuses, time limits, and that nothing is left behind."""

import contextlib
import functools
import io
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from scaling.__main__ import main
from scaling.recipe_process import ProcessResult, _Worker, start_worker
from scaling.store.outcome import FILE, load_outcome
from scaling.store.reader import load_store
from scaling.sweep.claims import find_holders
from scaling.sweep.engine import CELLS, Sweep
from scaling.sweep.plan import CellTask, open_planner
from scaling.sweep.progress import Progress
from scaling.sweep.run_cell import Limits
from scaling.sweep.study import Cell
from tests.distributed.forking import fork_command, start_forked
from tests.distributed.launching import IMAGES, TEXT, TINY, environment
from tests.processes import PATIENCE_S, wait_until_ended
from unitransformer.training.module import TrainingModule


def sweep_command(out: Path, *flags: str) -> list[str]:
    steps = TINY.index("--max-steps")
    tiny = [*TINY[:steps], *TINY[steps + 2 :]]
    return [sys.executable, "-m", "scaling", "sweep", "--out", str(out), *tiny, *flags]


def outcomes(folder: Path) -> list[Any]:
    return [load_outcome(path) for path in sorted((folder / CELLS).glob(f"*/{FILE}"))]


@pytest.mark.usefixtures("_no_orphans")
def test_every_kind_of_exit_has_its_status_and_the_sweep_continues(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    # With this vocabulary the logits of 2,048 samples take 2.4 GiB.
    flags = ["--recipe", "gpt", *TEXT[2:], "--model.num-classes", "20000", "--max-steps", "6"]
    flags += ["--data", "synthetic", "--batch-size", "2,2048,4096", "--devices", "1,2"]
    flags += ["--strategy", "single,fsdp", "--memory-limit", "1GiB", "--recheck", "0"]
    flags += ["--loss-block", "0"]  # all logits at once
    sweep = begin_sweep(out, *flags)
    sweep.join(PATIENCE_S)
    said = (tmp_path / "output.log").read_text()
    assert sweep.exitcode == 0, said
    found = {
        tuple(o.options[axis] for axis in ("strategy", "devices", "batch-size")): o.status
        for o in outcomes(out)
    }
    assert {key: found[key] for key in found if key[2] == "2"} == {
        ("single", "1", "2"): "ok",
        ("single", "2", "2"): "refused",
        ("fsdp", "1", "2"): "ok",
        ("fsdp", "2", "2"): "ok",
    }
    large = [status for (strategy, _, size), status in found.items() if size == "4096"]
    # Which of them run depends on the order, which a sweep draws.
    assert set(large) <= {"oom", "oom-inferred", "refused"}
    assert large.count("refused") == 1
    assert "oom-inferred" in large
    assert "12 cells finished" in said
    store = load_store([out], relative_to=out)
    assert len(store.cells) == 12
    assert [cell.run is not None for cell in store.cells if cell.outcome.status == "ok"] == [
        True
    ] * 3


def begin_sweep(out: Path, *flags: str) -> BaseProcess:
    """Runs a sweep in a fork, whose cells sleep in every step and use no processor."""
    arguments = sweep_command(out, *flags)[3:]

    def sweep() -> int:
        score = TrainingModule.training_step

        def pause(self: TrainingModule, *arguments: Any) -> Tensor:
            time.sleep(0.05)
            return score(self, *arguments)

        TrainingModule.training_step = pause  # type: ignore[method-assign]
        _Worker._start = start_forked  # type: ignore[assignment,method-assign]
        return main(arguments)

    log = out.parent / "output.log"
    return fork_command(sweep, log=log, variables=environment(out.parent))


ENDLESS = ("--recipe", "vit", *IMAGES, "--max-steps", "100000", "--devices", "2")


def test_a_cell_over_its_time_limit_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweep = begin_sweep(out, *ENDLESS, "--strategy", "ddp", "--time-limit", "15")
    command = psutil.Process(sweep.pid)
    family: set[psutil.Process] = set()
    while sweep.is_alive():
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= set(command.children(recursive=True))
        time.sleep(0.1)
    assert sweep.exitcode == 1
    (outcome,) = outcomes(out)
    assert outcome.status == "timeout"
    assert outcome.reason == "did not end within 15 s"
    assert any("step" in line for line in outcome.last_lines)
    assert len(family) >= 4  # the worker, its fork, and two ranks
    wait_until_ended(family)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_leaves_no_process_and_no_partial_cell(
    number: signal.Signals, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    sweep = begin_sweep(out, *ENDLESS, "--strategy", "ddp,fsdp")
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not any("step" in log.read_text() for log in (out / CELLS).glob("*/log.txt")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(sweep.pid).children(recursive=True)
        assert len(family) >= 4
        if number == signal.SIGTERM:  # a batch system signals every process
            (worker,) = (
                child for child in family if child.ppid() == sweep.pid and child.children()
            )
            for process in family:
                process.send_signal(number)
            time.sleep(0.3)
            assert worker.status() != psutil.STATUS_ZOMBIE, (
                "its end would be recorded as that of the cell"
            )
        os.kill(sweep.pid or 0, number)
        sweep.join(PATIENCE_S)
    finally:
        sweep.kill()
    wait_until_ended(family)
    assert outcomes(out) == []
    if number != signal.SIGKILL:
        assert sweep.exitcode == (75 if number == signal.SIGTERM else 1)
        said = (tmp_path / "output.log").read_text()
        assert "before the end; unfinished results are not written" in said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def share_added(out: Path, tasks: Sequence[CellTask]) -> float:
    """The overhead of a sweep with its terminal table, as a share of the time of its cells."""
    out.mkdir()
    terminal = Terminal()
    in_cells_s = 0.0
    with start_worker(out / "worker.log") as worker:

        def run(*arguments: Any, **options: Any) -> ProcessResult:
            nonlocal in_cells_s
            start_s = time.monotonic()
            ended = worker(*arguments, **options)
            in_cells_s += time.monotonic() - start_s
            return ended

        limits = Limits(limit_s=300)
        sweep = Sweep(folder=out, agenda=lambda _: tasks, limits=limits, runner=lambda _: run)
        holders = functools.partial(find_holders, out)
        with Progress(sweep.scan, holders, terminal, axes=["batch-size"]) as progress:
            start_s = time.monotonic()
            summary = sweep.work(progress)
            elapsed_s = time.monotonic() - start_s
    assert summary.statuses == {"ok": len(tasks)}
    assert "running" in terminal.getvalue()
    return elapsed_s / in_cells_s - 1


@pytest.mark.alone
def test_a_sweep_adds_at_most_two_percent_to_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Worker, "_start", start_forked)
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path / "cache"))
    flags = [*TINY, *TEXT, "--data", "synthetic", "--max-steps", "600"]
    options = dict(zip((word.removeprefix("--") for word in flags[::2]), flags[1::2], strict=True))
    with open_planner() as recipes:
        cells = [Cell(recipe="gpt", options={**options, "batch-size": n}) for n in "12"]
        tasks = [recipes.task(cell, 1) for cell in cells]
    shares = []
    for attempt in range(4):  # other processes may run for a moment
        shares.append(share_added(tmp_path / str(attempt), tasks))
        if shares[-1] <= 0.02:
            break
    print(json.dumps({"shares": shares}))
    assert min(shares) <= 0.02
