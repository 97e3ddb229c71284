"""Turns the unfinished cells of a sweep into arrays of jobs, and says what they may cost.

The cells on each number of nodes have one array, or several if the controller allows too few tasks
in one.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from slurm import scheduler
from slurm.batch_script import MOST, Job, seconds_of
from slurm.job_files import STUDY, SUBMITTED, read_json
from slurm.preflight import are_on_gpus, count_nodes, list_cells, sweep_folder
from slurm.runtime.allocation import flags_of, option_of
from unitransformer.cli import read_integer
from unitransformer.launch.variables import CELL_LIMIT_S
from unitransformer.record.units import format_count

START_S = 120  # from the start of a task to that of its cell; SLURM may signal a minute early


def sweep_jobs(job: Job, *, max_parallel: int, max_nodes: int | None = None) -> list[Job]:
    """Returns the arrays for the unfinished cells, fewest nodes first.

    The cells on each number of nodes have one array, or several if the controller allows too few
    tasks in one. A task runs further cells while its time lasts. There are as many tasks as run at
    once, and more only if these could run out of time before the last cell.

    Args:
        max_parallel: tasks that run at once, for each number of nodes.
        max_nodes: nodes that the sweep holds at once. The caller lets each array wait for the one
            before.

    Raises ValueError if an option does not apply to sweeps, or the job cannot run some cells.
    """
    if job.nodes != 1:
        raise ValueError(
            f"nodes is {job.nodes}; the cells of a sweep say how many nodes they need: add the "
            "axis num-nodes to the study, such as num-nodes: [1, 2], or --num-nodes 1,2 after --"
        )
    if job.array is not None:
        raise ValueError(f"array is {job.array}; leave it out: a sweep makes its own arrays")
    if max_parallel < 1:
        raise ValueError(f"max-parallel is {max_parallel}; it must be at least 1")
    if max_parallel > MOST:
        raise ValueError(f"max-parallel is {max_parallel}; it must be at most {MOST}")
    if "--stop-after" in flags_of(job.arguments) and _time_for_cells(job) is not None:
        raise ValueError(
            f"--stop-after after --: it follows from the time, {job.time}; leave it out"
        )
    if max_nodes is not None:
        _check_dependency(job, "--max-nodes")
    cells = list_cells(job)
    job = replace(job, on_gpus=are_on_gpus(cells))
    nodes_of = count_nodes(cells, job)
    left = cells
    if Path(sweep_folder(job)).exists():
        left = list_cells(job, "--left")
    all_of, left_of = (Counter(nodes_of[cell] for cell in group) for group in (cells, left))
    largest = max(left_of, default=1)
    if max_nodes is not None and max_nodes < largest:
        few = f"{left_of[largest]} cells need" if left_of[largest] > 1 else "1 cell needs"
        raise ValueError(
            f"max-nodes is {max_nodes}, and {few} {largest}; give --max-nodes {largest}"
        )
    own_limit = job.cluster.max_array_tasks
    limit = scheduler.max_array_tasks()
    limit = limit if own_limit is None else min(limit, own_limit)
    time_limit = _cell_time_limit(job)
    shapes: list[list[Job]] = []  # arrays for each number of nodes
    for nodes, number in sorted(left_of.items()):
        at_once = max_parallel if max_nodes is None else min(max_parallel, max_nodes // nodes)
        arguments = [*job.arguments, *time_limit]
        if max(nodes_of.values()) > 1:
            arguments += ["--only-nodes", str(nodes)]
        if not flags_of(arguments) & {"--max-cells", "--find-max-batch"}:
            arguments += ["--max-cells", str(number)]
        if (seconds := _time_for_cells(job)) is not None:
            arguments += ["--stop-after", str(seconds)]
        shape = replace(
            job,
            nodes=nodes,
            name=job.name if len(left_of) == 1 else f"{job.name}-{nodes}",
            cells=all_of[nodes],
            left=number,
            arguments=arguments,
            shared=f"{sweep_folder(job)}/{STUDY}",
        )
        tasks = max(math.ceil(number / _cells_per_task(shape)), min(number, at_once))
        tasks = tasks if own_limit is None else min(tasks, own_limit)
        shapes.append(_split(shape, tasks, at_once, limit))
        if len(shapes[-1]) > 1:
            _check_dependency(job, f"{tasks} tasks, of which an array may have {limit},")
    is_alone = sum(map(len, shapes)) == 1
    jobs: list[Job] = []
    for arrays in shapes:
        base = Path(job.folder) if is_alone else Path(job.folder, f"nodes-{arrays[0].nodes}")
        folders = _free_folders(base, arrays[0])
        jobs += [replace(array, folder=str(next(folders))) for array in arrays]
    return jobs


def _check_dependency(job: Job, reason: str) -> None:
    if "?" in (job.dependency or ""):
        raise ValueError(
            f"dependency is {job.dependency}; with {reason} arrays wait for each other too, and "
            "SLURM does not combine this with alternatives (?): leave one of the two out"
        )


def _cells_per_task(job: Job) -> int:
    """Returns how many cells a task certainly ends in its time, even if each takes the longest."""
    if "--find-max-batch" in flags_of(job.arguments):  # a search has more cells than are listed
        return 1
    at_most = read_integer(option_of(job.arguments, "--max-cells") or 1)
    if job.is_unlimited:
        return at_most
    left_s = _time_for_cells(job)
    if left_s is None:  # the partition's default, which is not known here
        return 1
    return max(1, min(at_most, int(left_s // (_cell_limit_s(job) + START_S))))


def find_short_arrays(jobs: Sequence[Job]) -> list[str]:
    """Returns a note for each number of nodes whose tasks could end before the last cell has run.

    A task that is requeued at its time limit goes on, unless it stops earlier by itself.
    """
    notes = []
    for nodes, group in itertools.groupby(jobs, key=lambda job: job.nodes):
        arrays = list(group)
        number = sum(array.left or 0 for array in arrays)
        tasks, per_task = sum(map(count_tasks, arrays)), _cells_per_task(arrays[0])
        can_end = _time_for_cells(arrays[0]) is not None or not arrays[0].requeue
        if tasks * per_task < number and can_end:
            notes.append(
                f"as few as {tasks * per_task} of {number} cells on {format_count(nodes, 'node')} "
                "may end in the time of these tasks; the same command then submits the others"
            )
    return notes


def _cell_limit_s(job: Job) -> float:
    limit = option_of(job.arguments, "--time-limit")
    try:
        return CELL_LIMIT_S if limit is None else float(limit)
    except ValueError:
        raise ValueError(f"time-limit is {limit}; give seconds, such as 3600") from None


def _split(job: Job, tasks: int, at_once: int, limit: int) -> list[Job]:
    """Returns arrays of at most `limit` tasks; one job without an array if that is 0."""
    if limit == 0:
        return [job]
    sizes = [min(limit, tasks - first) for first in range(0, tasks, limit)]
    cells_before = [(job.left or 0) * sum(sizes[:n]) // tasks for n in range(len(sizes) + 1)]
    return [
        replace(job, array=f"0-{size - 1}%{at_once}", left=end - begin)
        for size, (begin, end) in zip(sizes, itertools.pairwise(cells_before), strict=True)
    ]


def count_tasks(job: Job) -> int:
    """Returns the number of tasks of an array of `sweep_jobs`; 1 for a job without one."""
    return 1 if job.array is None else int(job.array.partition("%")[0].partition("-")[2]) + 1


def without_tasks(job: Job, number: int) -> Job | None:
    """Returns an array of `sweep_jobs` without `number` of its tasks; None if none is left."""
    tasks = count_tasks(job) - number
    if tasks < 1:
        return None
    if number == 0:
        return job
    assert job.array is not None
    left = math.ceil((job.left or 0) * tasks / count_tasks(job))
    return replace(job, array=f"0-{tasks - 1}%{job.array.partition('%')[2]}", left=left)


def _free_folders(base: Path, job: Job) -> Iterator[Path]:
    """Yields `base`, `base`-2, ..., without those of arrays of this sweep that were submitted."""
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if read_json(folder / SUBMITTED).get("shared") != job.shared:
            yield folder


def table_of(jobs: Sequence[Job]) -> str:
    """Returns the arrays of a sweep with the most that they may cost."""
    rows = []
    for job in jobs:
        number = job.left or 0
        limit_s = _cell_limit_s(job)
        tasks, _, at_once = (job.array or "one job%1").partition("%")
        hours = number * job.nodes * limit_s / 3600
        held = min(count_tasks(job), int(at_once)) * job.nodes
        rows.append((job.nodes, number, tasks, at_once, held, f"{hours:,.1f}"))
    headers = ("nodes", "cells", "tasks", "at once", "nodes at once", "node-hours at most")
    return tabulate(rows, headers, disable_numparse=True)


def _cell_time_limit(job: Job) -> list[str]:
    """Returns the option that ends a cell as a timeout before the time limit of its job.

    Without it, one task after the other would release a cell that takes longer.
    """
    left_s = _time_for_cells(job)
    if left_s is None:
        return []
    return ["--time-limit", str(left_s)] if left_s < _cell_limit_s(job) else []


def _time_for_cells(job: Job) -> int | None:
    """Returns the seconds that a task has for its cells; None without a time limit."""
    time_s = seconds_of(job.time)
    if time_s is None:
        return None
    left_s = time_s - job.cluster.signal_ahead_s - START_S
    if left_s <= 0:
        raise ValueError(
            f"time is {job.time}; {START_S} s to start a task and {job.cluster.signal_ahead_s} s "
            "to end it leave no time for a cell; give a longer --time"
        )
    return left_s
