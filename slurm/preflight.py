"""Asks recipes and sweeps about the options of a job before the job is queued."""

import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from slurm.batch_script import Job
from slurm.runtime.allocation import option_of, sweep_folder_of
from unitransformer.launch.subprocess_module import run_module

ANSWER_S, ANSWER_PER_COMMAND_S = 120.0, 1.0  # timeouts; login nodes are slow

RecipeCommand = tuple[str, tuple[str, ...]]  # name of the recipe, and its arguments
ShapeOptions = tuple[str, str | None, str | None]  # recipe, --num-nodes, --devices


def check_recipe(job: Job, recipe: str) -> bool:
    """Returns whether the recipe trains on GPUs, as its options and their files say.

    Raises ValueError for options that the recipe refuses, with the recipe's message.
    """
    (answer,) = _ask(
        [(recipe, tuple(first_task(job)))], {"devices": job.devices, "num_nodes": job.nodes}
    )
    if error := answer.get("misread") or answer.get("refused"):
        raise ValueError(f"recipe {recipe}: {error}")
    is_on_gpus: bool = answer["config"]["parallel"]["accelerator"] != "cpu"
    return is_on_gpus


def first_task(job: Job) -> list[str]:
    """Returns the arguments of the recipe in the first task of an array, which stands for all."""
    if not job.array:
        return [*job.arguments]
    number = re.split("[-,%]", job.array)[0]
    return [argument.replace("%a", number) for argument in job.arguments]


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


def sweep_folder(job: Job) -> str:
    return sweep_folder_of(job.arguments, job.directory)


def prepare_sweep(job: Job) -> None:
    """Creates the folder of the sweep, which every node has to see."""
    run_module("scaling", ["sweep", *job.arguments, "--prepare"], limit_s=ANSWER_S)


def list_cells(job: Job, *options: str) -> list[RecipeCommand]:
    listing = run_module("scaling", ["sweep", *job.arguments, "--list", *options], limit_s=ANSWER_S)
    cells = []
    for line in listing.splitlines():  # python -m recipes.gpt --batch-size 8 ...
        _, _, module, *arguments = shlex.split(line)
        cells.append((module.removeprefix("recipes."), tuple(arguments)))
    return cells


def are_on_gpus(cells: Sequence[RecipeCommand]) -> bool:
    """Returns whether the cells of a sweep train on GPUs; raises ValueError if only some do."""
    on_cpu = sum(option_of(arguments, "--accelerator") == "cpu" for _, arguments in cells)
    if 0 < on_cpu < len(cells):
        raise ValueError(
            f"accelerator is cpu in {on_cpu} of {len(cells)} cells of this sweep, and a task has "
            "GPUs or none; submit each accelerator alone, with its own --out: -- --accelerator cpu "
            "--out sweeps/cpu"
        )
    return not on_cpu


def count_nodes(cells: Sequence[RecipeCommand], job: Job) -> dict[RecipeCommand, int]:
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


def _ask(commands: Sequence[RecipeCommand], shape: Mapping[str, int]) -> list[dict[str, Any]]:
    """Returns the answer of `recipes.service.plan` for each command."""
    questions = [
        {"recipe": recipe, "arguments": arguments, "check": shape} for recipe, arguments in commands
    ]
    asked = "".join(f"{json.dumps(question)}\n" for question in questions)
    limit_s = ANSWER_S + ANSWER_PER_COMMAND_S * len(questions)
    answers = run_module("recipes.service.plan", [], limit_s=limit_s, stdin_text=asked).splitlines()
    return [json.loads(line) for line in answers]
