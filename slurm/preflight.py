"""Checks the options of a job through its recipe before the job is queued.

A sweep becomes an array of jobs over its cells.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slurm import scheduler
from slurm.batch_script import Job, seconds_of
from slurm.runtime.allocation import flags_of, option_of
from unitransformer.launch.subprocess_module import run_module
from unitransformer.launch.variables import CELL_LIMIT_S

ANSWER_S, ANSWER_PER_COMMAND_S = 120.0, 1.0  # timeouts; login nodes are slow
START_S = 120  # from the start of a task to that of its cell; SLURM may signal a minute early

RecipeCommand = tuple[str, Sequence[str]]  # name of the recipe, and its arguments


def to_sweep_array(job: Job, max_parallel: int) -> Job:
    """Returns the job of a sweep with one task per cell, of which `max_parallel` run at once.

    If there are more cells than an array may have tasks, each task runs several.

    Raises ValueError if an option does not apply to sweeps, or the job cannot run some cells.
    """
    if job.nodes != 1:
        raise ValueError(f"nodes is {job.nodes}; each cell of a sweep runs on one node")
    if job.array is not None:
        raise ValueError(f"array is {job.array}; leave it out: a sweep has one task per cell")
    if max_parallel < 1:
        raise ValueError(f"max-parallel is {max_parallel}; it must be at least 1")
    listing = run_module("scaling", ["sweep", *job.arguments, "--list"], limit_s=ANSWER_S)
    cells = []
    for line in listing.splitlines():  # python -m recipes.gpt --batch-size 8 ...
        _, _, module, *arguments = shlex.split(line)
        cells.append((module.removeprefix("recipes."), arguments))
    _check_cells(cells, job)
    limit = job.cluster.max_array_tasks
    limit = scheduler.max_array_tasks() if limit is None else limit
    tasks = max(1, min(len(cells), limit))
    arguments = [*job.arguments]
    if len(cells) > tasks and not flags_of(arguments) & {"--max-cells", "--find-max-batch"}:
        arguments += ["--max-cells", str(math.ceil(len(cells) / tasks))]
    arguments += _cell_time_limit(job)
    array = f"0-{tasks - 1}%{max_parallel}" if limit else None  # None: a single job
    return replace(job, array=array, cells=len(cells), arguments=arguments)


def _cell_time_limit(job: Job) -> list[str]:
    """Returns the option that ends a cell as a timeout before the time limit of its job.

    Without it, one task after the other would release a cell that takes longer.
    """
    time_s = seconds_of(job.time)
    if time_s is None:
        return []
    left_s = time_s - job.cluster.signal_ahead_s - START_S
    if left_s <= 0:
        raise ValueError(
            f"time is {job.time}; {START_S} s to start a task and {job.cluster.signal_ahead_s} s "
            "to end it leave no time for a cell; give a longer --time"
        )
    limit = option_of(job.arguments, "--time-limit")
    try:
        is_longer = left_s < (CELL_LIMIT_S if limit is None else float(limit))
    except ValueError:
        raise ValueError(f"time-limit is {limit}; give seconds, such as 3600") from None
    return ["--time-limit", str(left_s)] if is_longer else []


def _check_cells(cells: Sequence[RecipeCommand], job: Job) -> None:
    """Raises ValueError for cells with invalid options or that need more than the job has.

    Cells that a recipe refuses are allowed: the sweep reports them.
    """
    shapes = []
    for (recipe, arguments), answer in zip(cells, _ask(cells, {}), strict=True):
        if "misread" in answer:
            raise ValueError(f"recipe {recipe}: {answer['misread']}")
        if "config" in answer:
            command = f"python -m recipes.{recipe} {shlex.join(arguments)}"
            shapes.append((recipe, command, answer["config"]["parallel"]))
    for name, limit, fix in (
        ("num_nodes", 1, "submit them as jobs of recipes.{recipe} with --nodes {most}"),
        ("devices", job.devices, "submit with --devices {most}"),
    ):
        larger = [cell for cell in shapes if cell[2][name] > limit]
        if larger:
            recipe, command, shape = larger[0]
            fix = fix.format(recipe=recipe, most=max(shape[name] for _, _, shape in larger))
            raise ValueError(
                f"too few {name.removeprefix('num_')} for {len(larger)} cells of this sweep: a "
                f"task has {limit}, and the first of these cells needs {shape[name]}: {command}; "
                f"{fix}, or leave them out"
            )


def check_recipe(job: Job, recipe: str) -> None:
    """Raises ValueError for options that the recipe refuses, with the recipe's message."""
    (answer,) = _ask([(recipe, first_task(job))], {"devices": job.devices, "num_nodes": job.nodes})
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
