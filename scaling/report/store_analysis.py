"""Computes once per store what several pages and plots show: sweeps, curves and pooled launches."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import get_args

from scaling.analysis.efficiency import (
    Curve,
    MeasuredPoint,
    ModelOnMachine,
    Scatter,
    find_curves,
    find_scatters,
    pool,
)
from scaling.analysis.fastest import StrategyComparison, compare_strategies
from scaling.analysis.same_work import without_length
from scaling.prediction.held_out import HeldOut, predict_held_out
from scaling.report.coverage import Coverage, count_others, find_coverage
from scaling.report.plots import Plot, plots_of
from scaling.report.staleness import NOT_COMPARED, CurrentCode
from scaling.store.reader import Cell, Store
from scaling.store.run import Run
from unitransformer.config import Recipe
from unitransformer.costs.flops import count_parameters


@dataclass(frozen=True, kw_only=True)
class SweepOfRecipe:
    """The cells that one recipe has in one sweep."""

    recipe: Recipe
    name: str  # unlike that of any other sweep of the store
    cells: Sequence[Cell]  # by the values of the axes, then by repeat
    scatters: dict[ModelOnMachine, Scatter]

    @property
    def slug(self) -> str:
        """Begins the names of its plots."""
        return f"{self.recipe}-{self.name.replace(' ', '-')}"

    @cached_property
    def axes(self) -> list[str]:
        return find_axes(self.cells)

    @cached_property
    def runs(self) -> list[Run]:
        """The runs of the cells that ended well."""
        return [run for cell in self.cells if (run := cell.successful_run) is not None]

    @property
    def largest_model(self) -> int:
        """Parameters of the largest model that was measured; 0 if none was."""
        return max((count_parameters(run.config.model) for run in self.runs), default=0)

    @cached_property
    def points(self) -> list[MeasuredPoint]:
        return pool([run for run in self.runs if run.metrics is not None], self.scatters)

    @cached_property
    def curves(self) -> list[Curve]:
        return find_curves(self.runs, self.scatters)

    @cached_property
    def plots(self) -> list[Plot]:
        return plots_of(self.slug, self.points, self.curves)


class StoreAnalysis:
    """A store with everything that is computed from its runs. Mappings are by recipe, in order."""

    def __init__(self, store: Store, today: CurrentCode = NOT_COMPARED) -> None:
        self.store = store
        self.today = today  # what the records are compared with

    @cached_property
    def runs(self) -> dict[Recipe, list[Run]]:
        """Those that ended well, sorted by name."""
        runs = sorted(self.store.successful_runs, key=lambda run: run.name)
        return {
            recipe: [run for run in runs if run.config.recipe == recipe]
            for recipe in get_args(Recipe)
        }

    @cached_property
    def longest_runs(self) -> dict[Recipe, list[Run]]:
        """The longest first, of equally long ones the newest. Cells of sweeps only where a recipe
        has no single run."""
        single = {run.name for run in self.store.single_runs}
        longest = {}
        for recipe, runs in self.runs.items():
            if chosen := [run for run in runs if run.name in single] or [*runs]:
                chosen.sort(
                    key=lambda run: (run.num_steps, str(run.record.get("started_at"))), reverse=True
                )
                longest[recipe] = chosen
        return longest

    @cached_property
    def scatters(self) -> dict[ModelOnMachine, Scatter]:
        return find_scatters(self.store.successful_runs)

    @cached_property
    def points(self) -> dict[Recipe, list[MeasuredPoint]]:
        """A point for each configuration, whatever the length of its launches."""
        return {
            recipe: pool(
                [run for run in runs if run.metrics is not None], self.scatters, without_length
            )
            for recipe, runs in self.runs.items()
        }

    @cached_property
    def curves(self) -> dict[Recipe, list[Curve]]:
        return {recipe: find_curves(runs, self.scatters) for recipe, runs in self.runs.items()}

    @cached_property
    def comparisons(self) -> dict[Recipe, list[StrategyComparison]]:
        comparisons = {}
        for recipe in get_args(Recipe):
            runs = [run for run in self.store.runs if run.config.recipe == recipe]
            cells = [cell for cell in self.store.cells if cell.outcome.recipe == recipe]
            comparisons[recipe] = compare_strategies(runs, self.store.certificates, cells)
        return comparisons

    @cached_property
    def predictions(self) -> tuple[list[HeldOut], list[str]]:
        """Every measured configuration as predicted without it, and why others are not."""
        runs = self.store.successful_runs
        return predict_held_out(runs, lambda run: self.today.is_stale(run.record))

    @cached_property
    def coverage(self) -> tuple[dict[str, Coverage], dict[str, str]]:
        return find_coverage(self.store)

    def describe_coverage(self, sweep: str) -> str:
        """Returns what is missing of the study of this folder; empty if nothing is."""
        found, unread = self.coverage
        return found[sweep].describe() if sweep in found else unread.get(sweep, "")

    def count_others(self, runs: Iterable[Run]) -> tuple[int, int]:
        """Returns how many other configurations the studies of these runs name for the same work:
        all of them, and those that have not ended."""
        return count_others(self.coverage[0].values(), [run.name for run in runs])

    @cached_property
    def sweeps(self) -> list[SweepOfRecipe]:
        """By recipe, then by folder."""
        names = sweep_names(self.store)
        groups: dict[tuple[Recipe, str], list[Cell]] = {
            (recipe, sweep): [] for recipe in get_args(Recipe) for sweep in names
        }
        for cell in self.store.cells:
            groups[cell.outcome.recipe, cell.sweep].append(cell)
        return [
            SweepOfRecipe(
                recipe=recipe, name=names[sweep], cells=sorted_cells(cells), scatters=self.scatters
            )
            for (recipe, sweep), cells in groups.items()
            if cells
        ]


def sweep_names(store: Store) -> dict[str, str]:
    """Returns the name of each sweep by its folder: the last part, numbered if several share it or
    would share a page."""
    sweeps = sorted({*store.studies, *(cell.sweep for cell in store.cells)})
    last = {
        sweep: re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(sweep).name).strip("-") or "sweep"
        for sweep in sweeps
    }
    counts, names, pages = Counter(last.values()), dict[str, str](), set[str]()
    # A name that is not shared comes first, and so is not numbered.
    for sweep in sorted(sweeps, key=lambda sweep: counts[last[sweep]] > 1):
        number = sweeps.index(sweep) + 1
        name = f"{last[sweep]} {number}" if counts[last[sweep]] > 1 else last[sweep]
        while page_name(name).lower() in pages:  # some file systems ignore case
            name, number = f"{last[sweep]} {number}", number + 1
        names[sweep] = name
        pages.add(page_name(name).lower())
    return {sweep: names[sweep] for sweep in sweeps}


def page_name(sweep: str) -> str:
    """Returns the file name of the page of a sweep with this name."""
    name = sweep.replace(" ", "-")
    is_taken = name.lower() in (
        "conditions",
        "parity",
        "predictions",
        "runs",
        "scaling",
        "slurm-jobs",
    )
    return f"sweep-{name}.md" if is_taken else f"{name}.md"


def find_axes(cells: Sequence[Cell]) -> list[str]:
    """Returns the options in which cells differ, in the order in which they were given."""
    names = dict.fromkeys(name for cell in cells for name in cell.outcome.options)
    return [name for name in names if len({cell.outcome.options.get(name) for cell in cells}) > 1]


def sorted_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Sorts by the values of the axes, numbers as numbers, then by repeat."""
    axes = find_axes(cells)

    def place(cell: Cell) -> tuple[list[tuple[float, str]], int, str]:
        options = cell.outcome.options
        values = [_sortable(options.get(axis, "")) for axis in axes]
        return values, cell.outcome.repeat, cell.name

    return sorted(cells, key=place)


def _sortable(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value
