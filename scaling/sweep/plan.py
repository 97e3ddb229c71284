"""Tasks: the cells of a study, each repeat of it, and the run that it comes to on this machine."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling.sweep.study import Cell, Study
from unitransformer.config import RunConfig, from_dict
from unitransformer.costs.flops import count_flops
from unitransformer.launch.subprocess_module import open_module

PATIENCE_S = 300.0  # with an answer, on a machine that is busy importing


@dataclass(frozen=True, kw_only=True)
class CellTask:
    """A cell, once, and its run."""

    cell: Cell
    repeat: int
    config: RunConfig | None  # None: the recipe refuses it
    refusal: str | None = None  # and why

    @functools.cached_property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.cell.id}-{self.repeat}"


class RecipePlanner:
    """What the recipes answer on this machine, asked of one process, each question once."""

    def __init__(self) -> None:
        self._answers: dict[str, dict[str, Any]] = {}
        self._module = contextlib.ExitStack()
        self._ask: Callable[[str], str] | None = None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What `recipes.service.plan` answers; raises RuntimeError if it fails."""
        line = json.dumps(question)
        if line not in self._answers:
            if self._ask is None:
                module = open_module("recipes.service.plan", limit_s=PATIENCE_S)
                self._ask = self._module.enter_context(module)
            self._answers[line] = json.loads(self._ask(line))
        return self._answers[line]

    def rest(self) -> None:
        """End the process, which the next new question starts again."""
        self._ask = None
        self._module.close()

    def task(self, cell: Cell, repeat: int, *, is_here: bool = True) -> CellTask:
        """A cell and the run that it comes to; raises ValueError for options nobody knows.

        Args:
            is_here: whether it is this machine that will run it; else what a machine decides is
                left out of it, nothing heavy is imported, and refusals are those of the options.
        """
        beside: dict[str, Any] = {} if is_here else {"check": {}}
        answer = self.ask({"recipe": cell.recipe, "arguments": cell.arguments, **beside})
        config, refusal = _read(cell, answer)
        return CellTask(cell=cell, repeat=repeat, config=config, refusal=refusal)

    def machine(self) -> tuple[str, dict[str, Any]]:
        """The fingerprint under which this machine's calibrations are kept; its kind and memory."""
        answer = self.ask({"machine": True})
        return str(answer["fingerprint"]), dict(answer["host"])


@contextlib.contextmanager
def open_planner() -> Iterator[RecipePlanner]:
    """What can be asked until the block ends."""
    recipes = RecipePlanner()
    try:
        yield recipes
    finally:
        recipes.rest()


def plan_tasks(study: Study, recipes: RecipePlanner, *, is_here: bool = True) -> list[CellTask]:
    """Every cell and repeat.

    Args:
        is_here: as for `RecipePlanner.task`.

    Raises:
        ValueError: an axis or value that the recipes do not know.
        RuntimeError: the process failed.
    """
    cells = study.cells()
    check_unique(cells)
    return [
        recipes.task(cell, repeat, is_here=is_here)
        for repeat in range(1, study.repeats + 1)
        for cell in cells
    ]


def check_unique(cells: Sequence[Cell]) -> None:
    """Raises ValueError for two cells that are one."""
    found: set[str] = set()
    for cell in cells:
        if cell.id in found:
            raise ValueError(f"two cells are the same: {cell.command}; leave one out")
        found.add(cell.id)


def _read(cell: Cell, answer: Mapping[str, Any]) -> tuple[RunConfig | None, str | None]:
    if "misread" in answer:
        raise ValueError(f"recipe {cell.recipe}: {answer['misread']}")
    if "refused" in answer:
        return None, str(answer["refused"])
    return from_dict(RunConfig, answer["config"]), None


def sort_tasks(tasks: Sequence[CellTask]) -> list[CellTask]:
    """Each repeat of all cells before the next one. In a repeat first the refusals, which cost
    nothing; then the cheapest cells that show a value of an axis not seen yet; then by cost."""
    repeats = sorted({task.repeat for task in tasks})
    return [
        task for repeat in repeats for task in _of_one([t for t in tasks if t.repeat == repeat])
    ]


def _of_one(tasks: Sequence[CellTask]) -> Iterator[CellTask]:
    yield from (task for task in tasks if task.config is None)
    left = sorted((task for task in tasks if task.config is not None), key=_cost)
    seen: set[tuple[str, str, str]] = set()
    later = []
    for task in left:
        shown = {(task.cell.recipe, name, value) for name, value in task.cell.options.items()}
        if shown <= seen:
            later.append(task)
        else:
            seen |= shown
            yield task
    yield from later


def _cost(task: CellTask) -> tuple[float, str]:
    assert task.config is not None
    return train_flops(task.config), task.name


def train_flops(config: RunConfig) -> float:
    """Matrix products of a whole training, over all devices, what is computed again included."""
    units = config.global_batch_size * config.tokens_per_sample
    return count_flops(config)["hardware"] * units * config.max_steps
