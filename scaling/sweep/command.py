"""A sweep as it was asked for: planned, run and told; the exit code out."""

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling.recipe_process import Runner, can_fork, run_alone, start_worker
from scaling.store import outcome
from scaling.store.outcome import STUDY
from scaling.sweep import max_batch
from scaling.sweep.claims import find_holders
from scaling.sweep.engine import Agenda, Sweep, open_folder
from scaling.sweep.estimate import load_calibrations, render_plan
from scaling.sweep.job_status import JobReporter, report_summary
from scaling.sweep.options import SweepOptions
from scaling.sweep.plan import CellTask, RecipePlanner, open_planner, plan_tasks, sort_tasks
from scaling.sweep.progress import Progress
from scaling.sweep.study import Cell
from unitransformer.files import check_writable
from unitransformer.launch.process_tree import can_measure_memory
from unitransformer.launch.signals import STOP_SIGNALS, StopRequested, handle_signals
from unitransformer.launch.variables import without_launcher

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
    if options.limits.memory_limit_bytes is not None and not can_measure_memory():
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
    with open_planner() as recipes:
        return _run(options, recipes)


def _run(options: SweepOptions, recipes: RecipePlanner) -> int:
    tasks = sort_tasks(plan_tasks(options.study, recipes))
    fingerprint, host = recipes.machine()
    recipes.rest()

    def probe(cell: Cell, repeat: int) -> CellTask:
        task = recipes.task(cell, repeat)
        if host["gpus"]:  # whoever has asked for them may hold memory that cells want
            recipes.rest()
        return task

    if options.find_max_batch is not None:
        max_batch.check_limit(tasks, options.limits.memory_limit_bytes)
    if options.is_dry:
        calibrations = load_calibrations(fingerprint)
        print(render_plan(tasks, calibrations, price_per_hour=options.price_per_hour))
        if options.find_max_batch is not None:
            print("of each search only the first cell is listed: the next follow from it")
        return 0
    open_folder(options.out, options.study, options.limits, find_max_batch=options.find_max_batch)
    axes = _axes(options)
    agenda = _agenda(options, tasks, probe)
    with _stops_by_signals(), _runners(options.out) as runner:
        sweep = Sweep(
            folder=options.out,
            agenda=agenda,
            limits=options.limits,
            runner=runner,
            host=host,
            retry=options.retry,
            retry_before=options.retry_before,
        )
        holders = functools.partial(find_holders, options.out)
        with Progress(sweep.look, holders, sys.stdout, axes=axes) as progress:
            watch = JobReporter(progress, options.out)
            summary = sweep.work(watch, max_cells=options.max_cells)
    report_summary(summary)
    print(summary.in_words())
    if options.find_max_batch is not None:
        _, done = sweep.look()
        limit = options.find_max_batch
        found = max_batch.search_results(tasks, limit, probe, done, axes)
        max_batch.write_search_results(found, limit, options.out)
        print("\n".join(each.in_words(limit) for each in found))
    print(f"python -m scaling report {options.out} writes the tables")
    statuses = summary.statuses if options.max_cells is None else summary.own
    return 1 if any(statuses.get(status) for status in FAILED) else 0


def _watch(options: SweepOptions) -> int:
    """Show a sweep that others work on, on other machines perhaps, until all of it is done."""
    if not (options.out / STUDY).exists():
        raise ValueError(f"out {options.out} holds no sweep yet; start one, or name its --out")
    open_folder(options.out, options.study, options.limits, find_max_batch=options.find_max_batch)
    with open_planner() as recipes:
        # Where a search goes may be for the machine to say.
        is_here = options.find_max_batch is not None
        tasks = sort_tasks(plan_tasks(options.study, recipes, is_here=is_here))
        recipes.rest()
        return _look_on(options, _agenda(options, tasks, recipes.task))


def _look_on(options: SweepOptions, agenda: Agenda) -> int:
    sweep = Sweep(
        folder=options.out,
        agenda=agenda,
        limits=options.limits,
        runner=lambda _: run_alone,
    )
    holders = functools.partial(find_holders, options.out)
    with Progress(sweep.look, holders, sys.stdout, axes=_axes(options)) as progress:
        while progress.looks_again():
            time.sleep(LOOK_S)
    return 0


def _axes(options: SweepOptions) -> list[str]:
    """Those that tell cells apart."""
    searched = [] if options.find_max_batch is None else [outcome.AXIS]
    return [*options.study.varied(), *searched]


def _agenda(options: SweepOptions, tasks: Sequence[CellTask], probe: max_batch.PlanTask) -> Agenda:
    if options.find_max_batch is not None:
        return max_batch.search_agenda(tasks, options.find_max_batch, probe)
    return lambda _: tasks


@contextlib.contextmanager
def _runners(folder: Path) -> Iterator[Any]:
    """What runs a task: a fork of one worker where that is safe."""
    with start_worker(folder / f"worker-{os.getpid()}.log") as worker:

        def runner(task: CellTask) -> Runner:
            assert task.config is not None
            return worker if can_fork(task.config.parallel.accelerator) else run_alone

        yield runner


@contextlib.contextmanager
def _stops_by_signals() -> Iterator[None]:
    """What a batch system sends stops as Ctrl-C does."""

    def stop(number: int, _: object) -> None:
        raise StopRequested(signal.Signals(number).name)

    with handle_signals(STOP_SIGNALS, stop):
        yield
