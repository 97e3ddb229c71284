"""A store goes in; its sweeps come out, by recipe, with what each is called in a report."""

import re
from pathlib import PurePosixPath
from typing import get_args

from scaling.store.reader import Cell, Store
from unitransformer.config import Recipe


def sweeps_of(store: Store) -> dict[tuple[Recipe, str], list[Cell]]:
    """Cells by recipe and sweep, in the order of both."""
    grouped: dict[tuple[Recipe, str], list[Cell]] = {}
    for recipe in get_args(Recipe):
        for cell in sorted(store.cells, key=lambda cell: cell.name):
            if cell.outcome.recipe == recipe:
                grouped.setdefault((recipe, cell.sweep), []).append(cell)
    return grouped


def sweep_names(store: Store) -> dict[str, str]:
    """What each sweep is called: the last part of its folder that tells it from the others."""
    sweeps = sorted({cell.sweep for cell in store.cells})
    plain = {sweep: _plain(PurePosixPath(sweep).name) for sweep in sweeps}
    alike = {name for name in plain.values() if list(plain.values()).count(name) > 1}
    return {
        sweep: f"{name} {number}" if name in alike else name
        for number, (sweep, name) in enumerate(plain.items(), 1)
    }


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "sweep"


def slug_of(recipe: Recipe, name: str) -> str:
    """Begins the names of a sweep's plots."""
    return f"{recipe}-{name.replace(' ', '-')}"
