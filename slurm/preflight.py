"""Checks the options of a job through its recipe before the job is queued.

A sweep becomes an array of jobs for each number of nodes that its cells need.
"""

import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from slurm import scheduler
from slurm.batch_script import Job, seconds_of
from slurm.job_files import SUBMITTED, read_json
from slurm.runtime.allocation import flags_of, option_of, sweep_folder_of
from unitransformer.cli import read_integer
from unitransformer.launch.subprocess_module import run_module
from unitransformer.launch.variables import CELL_LIMIT_S
from unitransformer.record.units import format_count

ANSWER_S, ANSWER_PER_COMMAND_S = 120.0, 1.0  # timeouts; login nodes are slow
START_S = 120  # from the start of a task to that of its cell; SLURM may signal a minute early

RecipeCommand = tuple[str, tuple[str, ...]]  # name of the recipe, and its arguments
ShapeOptions = tuple[str, str | None, str | None]  # recipe, --num-nodes, --devices
STUDY = "study.json"  # in the folder of a sweep


def sweep_folder(job: Job) -> str:
    return sweep_folder_of(job.arguments, job.directory)


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
    if max_nodes is not None:
        _check_dependency(job, "--max-nodes")
    cells = _list_cells(job)
    nodes_of = _count_nodes(cells, job)
    left = cells
    if Path(sweep_folder(job)).exists():
        left = _list_cells(job, "--left")
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


def _list_cells(job: Job, *options: str) -> list[RecipeCommand]:
    listing = run_module("scaling", ["sweep", *job.arguments, "--list", *options], limit_s=ANSWER_S)
    cells = []
    for line in listing.splitlines():  # python -m recipes.gpt --batch-size 8 ...
        _, _, module, *arguments = shlex.split(line)
        cells.append((module.removeprefix("recipes."), tuple(arguments)))
    return cells


def prepare_sweep(job: Job) -> None:
    """Creates the folder of the sweep, which every node has to see."""
    run_module("scaling", ["sweep", *job.arguments, "--prepare"], limit_s=ANSWER_S)


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


def _count_nodes(cells: Sequence[RecipeCommand], job: Job) -> dict[RecipeCommand, int]:
    """Returns the nodes that each cell needs.

    Asks the recipes for cells that together have every value of every option, and every shape:
    parsing each of a thousand cells would take many seconds.

    Raises ValueError for cells with invalid options or that need more devices than the job has.
    Cells that a recipe refuses are allowed: the sweep reports them.
    """
    seen: set[Any] = set()
    asked = []
    for cell in dict.fromkeys(cells):
        recipe, arguments = cell
        new = {(recipe, *pair) for pair in itertools.pairwise(arguments)} | {_shape_options(cell)}
        if not new <= seen:
            seen |= new
            asked.append(cell)
    shapes: dict[ShapeOptions, Mapping[str, int]] = {}
    for cell, answer in zip(asked, _ask(asked, {}), strict=True):
        if "misread" in answer:
            raise ValueError(f"recipe {cell[0]}: {answer['misread']}")
        if "config" in answer:
            shapes.setdefault(_shape_options(cell), answer["config"]["parallel"])
    larger = [
        cell
        for cell in cells
        if (shape := shapes.get(_shape_options(cell))) and shape["devices"] > job.devices
    ]
    if larger:
        recipe, arguments = larger[0]
        needed = [shapes[_shape_options(cell)]["devices"] for cell in larger]
        raise ValueError(
            f"too few devices for {len(larger)} cells of this sweep: a task has {job.devices} per "
            f"node, and the first of these cells needs {needed[0]}: python -m recipes.{recipe} "
            f"{shlex.join(arguments)}; submit with --devices {max(needed)}, give num-nodes and "
            "fewer devices, or leave them out"
        )
    return {cell: _nodes(cell, shapes.get(_shape_options(cell))) for cell in cells}


def _shape_options(cell: RecipeCommand) -> ShapeOptions:
    recipe, arguments = cell
    return recipe, option_of(arguments, "--num-nodes"), option_of(arguments, "--devices")


def _nodes(cell: RecipeCommand, shape: Mapping[str, int] | None) -> int:
    """Returns the nodes of a cell; those of its options if the recipe refuses all of its shape."""
    if shape is not None:
        return shape["num_nodes"]
    given = option_of(cell[1], "--num-nodes") or ""
    return int(given) if given.isdecimal() else 1


def check_recipe(job: Job, recipe: str) -> None:
    """Raises ValueError for options that the recipe refuses, with the recipe's message."""
    (answer,) = _ask(
        [(recipe, tuple(first_task(job)))], {"devices": job.devices, "num_nodes": job.nodes}
    )
    if error := answer.get("misread") or answer.get("refused"):
        raise ValueError(f"recipe {recipe}: {error}")


def plan_on(hardware: str, job: Job) -> str:
    """Returns the predicted memory, time and cost of a checked job on a hardware.

    Raises:
        ValueError: the hardware is unknown, or the job cannot run on it.
        RuntimeError: the prediction fails.
    """
    if job.target == "sweep":
        arguments = ["sweep", *job.arguments]
        listing = run_module("scaling", [*arguments, "--list"], limit_s=ANSWER_S)
        if "--devices " not in listing and "--strategy single" not in listing:
            arguments += ["--devices", str(job.devices)]  # a cell uses all of its task
        arguments += ["--dry-run", "--hardware", hardware]
        return run_module("scaling", arguments, limit_s=ANSWER_S)
    shape = ["--nodes", str(job.nodes), "--devices", str(job.devices)]
    arguments = [hardware, job.target.removeprefix("recipes."), *shape, "--"]
    arguments += first_task(job)
    return run_module("scaling.prediction.plan", arguments, limit_s=ANSWER_S)


def first_task(job: Job) -> list[str]:
    """Returns the arguments of the recipe in the first task of an array, which stands for all."""
    if not job.array:
        return [*job.arguments]
    number = re.split("[-,%]", job.array)[0]
    return [argument.replace("%a", number) for argument in job.arguments]


def _ask(commands: Sequence[RecipeCommand], shape: Mapping[str, int]) -> list[dict[str, Any]]:
    """Returns the answer of `recipes.service.plan` for each command."""
    questions = [
        {"recipe": recipe, "arguments": arguments, "check": shape} for recipe, arguments in commands
    ]
    asked = "".join(f"{json.dumps(question)}\n" for question in questions)
    limit_s = ANSWER_S + ANSWER_PER_COMMAND_S * len(questions)
    answers = run_module("recipes.service.plan", [], limit_s=limit_s, stdin_text=asked).splitlines()
    return [json.loads(line) for line in answers]
