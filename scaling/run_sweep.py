"""A sweep as it was asked for: planned, run and told; the exit code out."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling import largest_batch
from scaling.estimate import render_plan
from scaling.live import Progress
from scaling.order import in_order
from scaling.places import check_writable
from scaling.processes import Runner, can_fork, run_alone, start_worker
from scaling.sweep import STUDY, Agenda, Sweep, open_folder
from scaling.sweep_options import SweepOptions
from scaling.tasks import Task, plan
from scaling.told_to_job import ToldToJob, tell_summary
from unitransformer.launchers import without_launcher
from unitransformer.process_tree import can_tell_memory
from unitransformer.stop_signals import SIGNALS, StopAsked

LOOK_S = 2.0  # between two looks at what others do
FAILED = ("crashed", "timeout", "preempted")


def run_sweep(options: SweepOptions) -> int:
    """Do what is left to do; 0 if every cell ended as well as it can, 1 if some failed.

    Raises:
        ValueError: axes or values the recipes do not know, a folder that holds something else.
        OSError: the folder cannot be written, at the start or later; what is finished stays.
        RuntimeError: the recipes could not be asked.
        KeyboardInterrupt: stopped by a signal; what is finished stays.
    """
    if options.limits.memory_limit_bytes is not None and not can_tell_memory():
        raise ValueError("memory-limit needs /proc, which this system does not have; leave it out")
    if options.is_list:
        print("\n".join(cell.command for cell in options.study.cells() * options.study.repeats))
        return 0
    if options.is_watch:
        return _watch(options)
    check_writable("out", options.out, is_folder=True)
    # A launcher may have started this process: what a cell starts are its own ranks.
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        del os.environ[name]
    tasks = in_order(plan(options.study))
    if options.is_dry:
        print(render_plan(tasks, price_per_hour=options.price_per_hour))
        if options.find_max_batch is not None:
            print("of each search only the first cell is listed: the next follow from it")
        return 0
    open_folder(options.out, options.study, options.limits, find_max_batch=options.find_max_batch)
    axes = _axes(options)
    with _stops_by_signals(), _runners(options.out) as runner:
        sweep = Sweep(
            folder=options.out,
            agenda=_agenda(options, tasks),
            limits=options.limits,
            runner=runner,
            retry=options.retry,
            retry_before=options.retry_before,
        )
        with Progress(sweep.look, sys.stdout, axes=axes) as progress:
            watch = ToldToJob(progress, options.out)
            summary = sweep.work(watch, max_cells=options.max_cells)
    tell_summary(summary)
    print(summary.in_words())
    if options.find_max_batch is not None:
        _, done = sweep.look()
        for found in largest_batch.findings(tasks, options.find_max_batch, done, axes):
            print(found.in_words(options.find_max_batch))
    print(f"python -m scaling report {options.out} writes the tables")
    statuses = summary.statuses if options.max_cells is None else summary.own
    return 1 if any(statuses.get(status) for status in FAILED) else 0


def _watch(options: SweepOptions) -> int:
    """Show a sweep that others work on, on other machines perhaps, until all of it is done."""
    if not (options.out / STUDY).exists():
        raise ValueError(f"out {options.out} holds no sweep yet; start one, or name its --out")
    open_folder(options.out, options.study, options.limits, find_max_batch=options.find_max_batch)
    # Where a search starts may be for the machine to say.
    tasks = in_order(plan(options.study, is_here=options.find_max_batch is not None))
    sweep = Sweep(
        folder=options.out,
        agenda=_agenda(options, tasks),
        limits=options.limits,
        runner=lambda _: run_alone,
    )
    with Progress(sweep.look, sys.stdout, axes=_axes(options)) as progress:
        while progress.looks_again():
            time.sleep(LOOK_S)
    return 0


def _axes(options: SweepOptions) -> list[str]:
    """Those that tell cells apart."""
    searched = [] if options.find_max_batch is None else [largest_batch.AXIS]
    return [*options.study.varied(), *searched]


def _agenda(options: SweepOptions, tasks: Sequence[Task]) -> Agenda:
    if options.find_max_batch is not None:
        return largest_batch.search(tasks, options.find_max_batch)
    return lambda _: tasks


@contextlib.contextmanager
def _runners(folder: Path) -> Iterator[Any]:
    """What runs a task: a fork of one worker where that is safe."""
    with start_worker(folder / f"worker-{os.getpid()}.log") as worker:

        def runner(task: Task) -> Runner:
            assert task.config is not None
            return worker if can_fork(task.config.parallel.accelerator) else run_alone

        yield runner


@contextlib.contextmanager
def _stops_by_signals() -> Iterator[None]:
    """What a batch system sends stops as Ctrl-C does."""

    def stop(number: int, _: object) -> None:
        raise StopAsked(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
