"""Turns a study into ordered tasks, each with the run config that its recipe resolves here."""

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

ANSWER_LIMIT_S = 300.0  # importing torch takes minutes on a busy machine


@dataclass(frozen=True, kw_only=True)
class CellTask:
    """One repeat of a cell."""

    cell: Cell
    repeat: int  # from 1
    config: RunConfig | None  # None: the recipe refuses the options
    refusal: str | None = None  # why the recipe refuses them

    @functools.cached_property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.cell.id}-{self.repeat}"

    @property
    def num_nodes(self) -> int:
        """The nodes that it needs; 1 if the recipe refuses it."""
        return 1 if self.config is None else self.config.parallel.num_nodes


class RecipePlanner:
    """Asks one `recipes.service.plan` process what cells resolve to, each question once."""

    def __init__(self) -> None:
        self._answers: dict[str, dict[str, Any]] = {}
        self._process = contextlib.ExitStack()
        self._ask: Callable[[str], str] | None = None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer of `recipes.service.plan`; raises RuntimeError if it fails."""
        line = json.dumps(question)
        if line not in self._answers:
            if self._ask is None:
                module = open_module("recipes.service.plan", limit_s=ANSWER_LIMIT_S)
                self._ask = self._process.enter_context(module)
            self._answers[line] = json.loads(self._ask(line))
        return self._answers[line]

    def close(self) -> None:
        """Ends the process; the next new question starts another."""
        self._ask = None
        self._process.close()

    def task(self, cell: Cell, repeat: int, *, is_here: bool = True) -> CellTask:
        """Resolves the config of a cell; raises ValueError for an unknown option or value.

        Unless this machine runs the cell (`is_here`), only its options are checked, and what
        depends on the machine stays open: that needs no import of torch.
        """
        question = {"recipe": cell.recipe, "arguments": cell.arguments}
        answer = self.ask({**question, **({"any_nodes": True} if is_here else {"check": {}})})
        if "misread" in answer:
            raise ValueError(f"recipe {cell.recipe}: {answer['misread']}")
        if "refused" in answer:
            return CellTask(cell=cell, repeat=repeat, config=None, refusal=str(answer["refused"]))
        return CellTask(cell=cell, repeat=repeat, config=from_dict(RunConfig, answer["config"]))

    def machine(self) -> tuple[str, dict[str, Any]]:
        """Returns this machine's fingerprint, and its processor, memory and GPUs."""
        answer = self.ask({"machine": True})
        return str(answer["fingerprint"]), dict(answer["host"])


def open_planner() -> contextlib.closing[RecipePlanner]:
    return contextlib.closing(RecipePlanner())


def plan_tasks(study: Study, planner: RecipePlanner, *, is_here: bool = True) -> list[CellTask]:
    """Returns a task for every cell and repeat.

    Raises ValueError for a cell that occurs twice, and as `RecipePlanner.task` and its `ask`.
    """
    cells = distinct_cells(study)
    return [
        planner.task(cell, repeat, is_here=is_here)
        for repeat in range(1, study.repeats + 1)
        for cell in cells
    ]


def distinct_cells(study: Study) -> list[Cell]:
    """Returns all cells; raises ValueError for a cell that occurs twice."""
    cells = study.cells()
    seen: set[str] = set()
    for cell in cells:
        if cell.id in seen:
            raise ValueError(f"two cells are the same: {cell.command}; leave one out")
        seen.add(cell.id)
    return cells


def sort_tasks(tasks: Sequence[CellTask]) -> list[CellTask]:
    """Returns the tasks in the order in which a sweep runs them, one repeat after the other.

    Within a repeat refused cells come first, since they cost nothing. Then come the cheapest cells
    that cover every value of every axis, and last all others by cost.
    """
    repeats = sorted({task.repeat for task in tasks})
    return [
        task for repeat in repeats for task in _sorted([t for t in tasks if t.repeat == repeat])
    ]


def _sorted(tasks: Sequence[CellTask]) -> Iterator[CellTask]:
    yield from (task for task in tasks if task.config is None)
    seen: set[tuple[str, str, str]] = set()
    later = []
    costs = [(train_flops(task.config), task.name, task) for task in tasks if task.config]
    for _, _, task in sorted(costs):
        values = {(task.cell.recipe, name, value) for name, value in task.cell.options.items()}
        if values <= seen:
            later.append(task)
        else:
            seen |= values
            yield task
    yield from later


def train_flops(config: RunConfig) -> float:
    """Returns the FLOPs of all matrix products of a training run, including recomputed ones."""
    units = config.global_batch_size * config.tokens_per_sample
    return count_flops(config)["hardware"] * units * config.max_steps
