"""`python -m scaling sweep`: plans, runs or watches a sweep."""

import contextlib
import functools
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from scaling.recipe_process import Runner, can_fork, run_alone, start_ranks_with, start_worker
from scaling.store.outcome import AXIS, STUDY
from scaling.sweep import max_batch
from scaling.sweep.claims import find_holders
from scaling.sweep.engine import Agenda, Sweep, SweepSummary, Unobserved, open_folder
from scaling.sweep.estimate import load_calibrations, render_plan
from scaling.sweep.launched_cell import launch_lines, run_launched
from scaling.sweep.options import SweepOptions
from scaling.sweep.plan import (
    CellTask,
    RecipePlanner,
    distinct_cells,
    open_planner,
    plan_tasks,
    sort_tasks,
)
from scaling.sweep.progress import Progress
from scaling.sweep.run_cell import now
from scaling.sweep.study import Cell
from unitransformer.cli import is_output_read, only_reports
from unitransformer.files import check_is_utf8, check_writable
from unitransformer.launch.process_tree import can_measure_memory
from unitransformer.launch.signals import STOP_SIGNALS, StopRequested, handle_signals
from unitransformer.launch.variables import RANKS_COMMAND, without_launcher

WATCH_INTERVAL_S = 2.0
ONLY_FIRST = "this lists only the first cell of each search: the others depend on its result"
FAILED = ("diverged", "crashed", "timeout", "preempted")


def run_sweep(options: SweepOptions, arguments: Sequence[str]) -> int:
    """Runs the unfinished cells; returns 1 if some cell failed, otherwise 0.

    Args:
        arguments: the command line of the sweep.

    Raises as `open_folder`, `plan_tasks` and `Sweep.work`.
    """
    if options.limits.memory_limit_bytes is not None and not can_measure_memory():
        raise ValueError("memory-limit needs /proc, which this system does not have; leave it out")
    if options.is_list and not options.is_dry:
        with open_planner() as planner:  # refuses what is no option or value of a recipe
            for cell in _cells_with_all_values(distinct_cells(options.study)):
                planner.task(cell, repeat=1, is_here=False)
        tasks = left_tasks(options) if options.lists_left else _unresolved_tasks(options)
        if options.only_nodes is not None:
            tasks = [task for task in tasks if task.cell.num_nodes == options.only_nodes]
        print("".join(f"{task.cell.command}\n" for task in tasks), end="")
        return 0
    if options.is_watch:
        return _watch(options)
    check_is_utf8("out", options.out.absolute())
    check_writable("out", options.out, is_folder=True)
    if options.hardware is not None:
        return _plan_for(options.hardware, options)
    if options.is_prepared:
        limit = options.find_max_batch
        open_folder(options.out, options.study, options.limits, find_max_batch=limit)
        return 0
    launcher = {n: v for n, v in os.environ.items() if n not in without_launcher(os.environ)}
    # If a launcher has started this process, cells must not take its ranks for theirs.
    for name in launcher:
        del os.environ[name]
    if options.run_cell is not None:
        code, text = run_launched(options, launcher)
        if text:
            print(text)
        return code
    if options.only_nodes not in (None, 1) and RANKS_COMMAND not in os.environ:
        raise ValueError(
            f"only-nodes is {options.only_nodes}, and this process is not in a SLURM job of so "
            "many nodes; leave only-nodes out, or submit: python -m slurm.submit sweep"
        )
    if not options.is_dry and not _left_here(options):
        return _report_finished(options)
    with open_planner() as planner:
        return _run(options, planner, arguments)


def _cells_with_all_values(cells: Iterable[Cell]) -> Iterator[Cell]:
    """Yields cells that together have every value of every option: parsing a thousand takes 7 s."""
    seen: set[tuple[str, ...]] = set()
    for cell in cells:
        values = {(cell.recipe, *pair) for pair in cell.options.items()}
        if not values <= seen:
            seen |= values
            yield cell


def left_tasks(options: SweepOptions) -> list[CellTask]:
    """Returns the tasks without an outcome, which do not know their configs yet.

    A search has all of its first cells: the others depend on their results.
    """
    tasks = _unresolved_tasks(options)
    if options.find_max_batch is not None or not (options.out / STUDY).exists():
        return tasks
    _, done = _sweep(options, lambda _: tasks, lambda _: run_alone).scan()
    return [task for task in tasks if task.name not in done]


def _unresolved_tasks(options: SweepOptions) -> list[CellTask]:
    return [
        CellTask(cell=cell, repeat=repeat, config=None)
        for repeat in range(1, options.study.repeats + 1)
        for cell in distinct_cells(options.study)
    ]


def _left_here(options: SweepOptions) -> bool:
    """Whether a cell is left; in a SLURM job, one on so many nodes as the job has."""
    nodes = options.only_nodes
    return any(nodes in (None, task.cell.num_nodes) for task in left_tasks(options))


def _report_finished(options: SweepOptions) -> int:
    """Says how the cells ended, without asking the recipes for anything."""
    open_folder(options.out, options.study, options.limits, find_max_batch=options.find_max_batch)
    tasks = _unresolved_tasks(options)
    summary = _sweep(options, lambda _: tasks, lambda _: run_alone).work(Unobserved(), max_cells=0)
    print(summary.format())
    print(_next_command(options))
    return _exit_code(summary, options)


def _next_command(options: SweepOptions) -> str:
    quoted = shlex.quote(str(options.out))
    return f"to write tables and plots: python -m scaling report {quoted}"


def _exit_code(summary: SweepSummary, options: SweepOptions) -> int:
    statuses = summary.statuses if options.max_cells is None else summary.statuses_here
    return 1 if any(statuses.get(status) for status in FAILED) else 0


def _sweep(
    options: SweepOptions,
    agenda: Agenda,
    runner: Callable[[CellTask], Runner],
    host: Mapping[str, Any] | None = None,
) -> Sweep:
    return Sweep(
        folder=options.out,
        agenda=agenda,
        limits=options.limits,
        runner=runner,
        host=host,
        num_nodes=options.only_nodes or 1,
        retry=options.retry,
        retry_before=options.retry_before or now(),
    )


def _plan_for(name: str, options: SweepOptions) -> int:
    """Prints a plan for a hardware that is not here."""
    from scaling.prediction.hardware import load_hardware  # numpy, which only a plan needs
    from scaling.sweep.hardware_plan import plan_cells, render_cells

    hardware = load_hardware(name)
    cells = plan_cells(options.study, hardware)
    price, is_list = options.price_per_hour, options.is_list
    print(render_cells(cells, hardware, price_per_hour=price, is_list=is_list))
    if options.find_max_batch is not None:
        print(ONLY_FIRST)
    return 0


def _run(options: SweepOptions, planner: RecipePlanner, arguments: Sequence[str]) -> int:
    tasks = sort_tasks(plan_tasks(options.study, planner))
    fingerprint, host = planner.machine()
    planner.close()

    def plan(cell: Cell, repeat: int) -> CellTask:
        task = planner.task(cell, repeat)
        if host["gpus"]:  # the planner's process may hold GPU memory that cells need
            planner.close()
        return task

    limit = options.find_max_batch
    if limit is not None:
        max_batch.check_limit(tasks, options.limits.memory_limit_bytes)
    if options.is_dry:
        calibrations = load_calibrations(fingerprint)
        print(render_plan(tasks, calibrations, price_per_hour=options.price_per_hour))
        if limit is not None:
            print(ONLY_FIRST)
        return 0
    only_reports()
    open_folder(options.out, options.study, options.limits, find_max_batch=limit)
    log = options.out / f"worker-{os.getpid()}.log"
    with _stop_signals_raise(), start_worker(log) as worker:

        def runner(task: CellTask) -> Runner:
            assert task.config is not None
            if task.num_nodes > 1:
                command = json.loads(os.environ[RANKS_COMMAND])
                return start_ranks_with(command, task.config.parallel.devices)
            return worker if can_fork(task.config.parallel.accelerator) else run_alone

        sweep = _sweep(options, _agenda(options, tasks, plan), runner, host)
        with _progress(sweep, options) as progress:
            summary = sweep.work(
                progress, max_cells=options.max_cells, stop_after_s=options.stop_after_s
            )
    print(summary.format())
    if options.only_nodes is None:
        _, done = sweep.scan()
        rest = [task for task in tasks if task.name not in done]
        print("".join(launch_lines(rest, arguments, is_search=limit is not None)), end="")
    if limit is not None:
        _, done = sweep.scan()
        results = max_batch.search_results(tasks, limit, plan, done, _axes(options))
        max_batch.write_search_results(results, limit, options.out)
        print("\n".join(result.format(limit) for result in results))
    print(_next_command(options))
    return _exit_code(summary, options)


def _watch(options: SweepOptions) -> int:
    """Shows a sweep that other processes run, possibly on other machines, until it is finished."""
    if not (options.out / STUDY).exists():
        raise ValueError(f"out {options.out} holds no sweep yet; start one, or name its --out")
    open_folder(options.out, options.study, options.limits, find_max_batch=options.find_max_batch)
    with open_planner() as planner:
        # The course of a search may depend on the machine.
        is_here = options.find_max_batch is not None
        tasks = sort_tasks(plan_tasks(options.study, planner, is_here=is_here))
        planner.close()
        sweep = Sweep(
            folder=options.out,
            agenda=_agenda(options, tasks, planner.task),
            limits=options.limits,
            runner=lambda _: run_alone,
        )
        with _progress(sweep, options) as progress:
            while progress.refresh() and is_output_read():
                time.sleep(WATCH_INTERVAL_S)
        print(progress.headline())
    return 0


def _progress(sweep: Sweep, options: SweepOptions) -> Progress:
    holders = functools.partial(find_holders, options.out)
    return Progress(sweep.scan, holders, sys.stdout, axes=_axes(options))


def _axes(options: SweepOptions) -> list[str]:
    searched = [] if options.find_max_batch is None else [AXIS]
    return [*options.study.varied_axes(), *searched]


def _agenda(options: SweepOptions, tasks: Sequence[CellTask], plan: max_batch.PlanTask) -> Agenda:
    if options.find_max_batch is not None:
        return max_batch.search_agenda(tasks, options.find_max_batch, plan)
    return lambda _: tasks


@contextlib.contextmanager
def _stop_signals_raise() -> Iterator[None]:
    """Within, the signals of a batch system raise `StopRequested`, a KeyboardInterrupt."""

    def stop(number: int, _: object) -> None:
        raise StopRequested(signal.Signals(number).name)

    with handle_signals(STOP_SIGNALS, stop):
        yield
