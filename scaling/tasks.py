"""Tasks: the cells of a study, each repeat of it, and the run that it comes to on this machine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling.study import Cell, Study
from unitransformer.config import RunConfig, from_dict
from unitransformer.modules import run_module

PATIENCE_S, PATIENCE_EACH_S = 300.0, 2.0  # for a machine that is busy importing, and a question


@dataclass(frozen=True, kw_only=True)
class Task:
    """A cell, once, and its run."""

    cell: Cell
    repeat: int
    config: RunConfig | None  # None: the recipe refuses it
    refusal: str | None = None  # and why

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.cell.id}-{self.repeat}"


def plan(study: Study, *, is_here: bool = True) -> list[Task]:
    """Every cell and repeat. What each would run is asked of the recipes, in one process.

    Args:
        is_here: whether it is this machine that will run them; else what a machine decides is
            left out of it, nothing heavy is imported, and refusals are those of the options alone.

    Raises:
        ValueError: an axis or value that the recipes do not know.
        RuntimeError: the process failed.
    """
    cells = study.cells()
    beside: dict[str, Any] = {} if is_here else {"check": {}}
    answers = ask([{"recipe": c.recipe, "arguments": c.arguments, **beside} for c in cells])
    runs = dict(zip(cells_by_id(cells), map(_read, cells, answers), strict=True))
    return [
        Task(cell=cell, repeat=repeat, config=runs[cell.id][0], refusal=runs[cell.id][1])
        for repeat in range(1, study.repeats + 1)
        for cell in cells
    ]


def cells_by_id(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Raises ValueError for two cells that are one."""
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.id in found:
            raise ValueError(f"two cells are the same: {cell.command}; leave one out")
        found[cell.id] = cell
    return found


def this_machine() -> str:
    """The fingerprint under which this machine's calibrations are kept."""
    return str(ask([{"machine": True}])[0]["fingerprint"])


def ask(questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `recipes.plan` answers to each; raises RuntimeError if it fails."""
    asked = "".join(f"{json.dumps(question)}\n" for question in questions)
    limit_s = PATIENCE_S + PATIENCE_EACH_S * len(questions)
    printed = run_module("recipes.plan", [], limit_s=limit_s, asked=asked)
    return [json.loads(line) for line in printed.splitlines()]


def _read(cell: Cell, answer: Mapping[str, Any]) -> tuple[RunConfig | None, str | None]:
    if "misread" in answer:
        raise ValueError(f"recipe {cell.recipe}: {answer['misread']}")
    if "refused" in answer:
        return None, str(answer["refused"])
    return from_dict(RunConfig, answer["config"]), None
