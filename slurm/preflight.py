"""What the recipes say of a job before it is queued, and a sweep as an array over its cells."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from slurm.batch_script import Job, seconds_of
from slurm.runtime.allocation import option_of
from unitransformer.launch.subprocess_module import run_module
from unitransformer.launch.variables import CELL_LIMIT_S

PATIENCE_S, PATIENCE_EACH_S = 120.0, 1.0  # for an answer; login nodes are slow
START_S = 120  # of a task, until its cell runs; the signal may come a minute early, too
MAX_ARRAY = 1000  # tasks that most clusters take in one array; beyond, each runs several cells


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a recipe is to be asked."""

    recipe: str
    arguments: Sequence[str]

    def in_words(self) -> str:
        return f"python -m recipes.{self.recipe} {shlex.join(self.arguments)}"


def as_array(job: Job, max_parallel: int) -> Job:
    """A sweep's job with a task for every cell, at most `max_parallel` of them at once.

    Raises:
        ValueError: options that do not go with a sweep, or cells that the job cannot run.
    """
    if job.nodes != 1:
        raise ValueError(f"nodes is {job.nodes}; a sweep's cells run on one node each")
    if job.array is not None:
        raise ValueError(f"array is {job.array}; a sweep has a task for every cell: leave it out")
    if max_parallel < 1:
        raise ValueError(f"max-parallel is {max_parallel}; it must be at least 1")
    listing = ["sweep", *job.arguments, "--list"]
    lines = run_module("scaling", listing, limit_s=PATIENCE_S).splitlines()
    # python -m recipes.gpt --batch-size 8 ...
    words = [shlex.split(line) for line in lines]
    cells = [Command(recipe=each[2].removeprefix("recipes."), arguments=each[3:]) for each in words]
    _check_cells(cells, job)
    tasks = min(len(cells), MAX_ARRAY)
    several = math.ceil(len(cells) / tasks)
    arguments = [*job.arguments, *(["--max-cells", str(several)] if several > 1 else [])]
    arguments += _time_limit(job)
    array = f"0-{tasks - 1}%{max_parallel}"
    return replace(job, array=array, cells=len(cells), arguments=arguments)


def _time_limit(job: Job) -> list[str]:
    """Of a cell, where the job ends sooner: a longer one would be given back by every task that
    runs it, again and again, and this way it has an outcome."""
    if job.time is None:
        return []
    left_s = seconds_of(job.time) - job.cluster.signal_ahead_s - START_S
    if left_s <= 0:
        raise ValueError(
            f"time is {job.time}, and {START_S} s for a task's start and "
            f"{job.cluster.signal_ahead_s} s for its end leave a cell nothing; give more time"
        )
    asked = option_of(job.arguments, "--time-limit")
    try:
        is_longer = left_s < (CELL_LIMIT_S if asked is None else float(asked))
    except ValueError:
        raise ValueError(f"time-limit is {asked}; give seconds, as 3600") from None
    return ["--time-limit", str(left_s)] if is_longer else []


def _check_cells(cells: Sequence[Command], job: Job) -> None:
    """Raises ValueError for cells that no task of the array could run.

    A sweep shows what its recipes refuse; what cannot be read at all is a mistake.
    """
    shapes = []
    for cell, answer in zip(cells, _ask(cells, {}), strict=True):
        if "misread" in answer:
            raise ValueError(f"recipe {cell.recipe}: {answer['misread']}")
        shapes.append((cell, answer["config"]["parallel"] if "config" in answer else {}))
    for name, has, cure in (
        ("num_nodes", 1, "one node; run them by slurm.submit recipes.{recipe} --nodes {most}"),
        ("devices", job.devices, f"{job.devices} devices; submit with --devices {{most}}"),
    ):
        more = [(cell, shape[name]) for cell, shape in shapes if shape.get(name, 1) > has]
        if more:
            first, asked = more[0]
            most = max(number for _, number in more)
            raise ValueError(
                f"{name.replace('_', '-')} is {asked} in {first.in_words()}, the first of "
                f"{len(more)} such cells, and a task of a sweep has "
                f"{cure.format(recipe=first.recipe, most=most)}, or leave them out"
            )


def check_recipe(command: Command, job: Job) -> None:
    """Raises ValueError for options that the recipe does not take, in its words."""
    if job.array:  # %a becomes the number of a task, and the first stands for all
        first = re.split("[-,%]", job.array)[0]
        arguments = [word.replace("%a", first) for word in command.arguments]
        command = replace(command, arguments=arguments)
    (answer,) = _ask([command], {"devices": job.devices, "num_nodes": job.nodes})
    if wrong := answer.get("misread") or answer.get("refused"):
        raise ValueError(f"recipe {command.recipe}: {wrong}")


def _ask(commands: Sequence[Command], shape: Mapping[str, int]) -> list[dict[str, Any]]:
    """What `recipes.service.plan` answers to each."""
    questions = [{**asdict(command), "check": shape} for command in commands]
    asked = "".join(f"{json.dumps(question)}\n" for question in questions)
    limit_s = PATIENCE_S + PATIENCE_EACH_S * len(questions)
    answers = run_module("recipes.service.plan", [], limit_s=limit_s, stdin_text=asked).splitlines()
    return [json.loads(line) for line in answers]
