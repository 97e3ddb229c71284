"""Computes once per store what several pages and plots show: curves, pooled launches and plots."""

from functools import cached_property
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
from scaling.report.plots import Plot, plots_of
from scaling.report.sweeps import SweepOfRecipe, sorted_cells, sweep_names
from scaling.store.reader import Cell, Store
from scaling.store.run import Run
from unitransformer.config import Recipe


class StoreAnalysis:
    """A store with everything that is computed from its runs. Mappings are by recipe, in order."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @cached_property
    def runs(self) -> dict[Recipe, list[Run]]:
        return {
            recipe: [run for run in self.store.runs if run.config.recipe == recipe]
            for recipe in get_args(Recipe)
        }

    @cached_property
    def longest_runs(self) -> dict[Recipe, list[Run]]:
        """Runs that ended well: the longest first, of equally long ones the newest. Cells of sweeps
        only where a recipe has no single run."""
        single = {run.name for run in self.store.single_runs}
        longest = {}
        for recipe, runs in self.runs.items():
            ended_well = sorted((run for run in runs if run.is_ok), key=lambda run: run.name)
            chosen = [run for run in ended_well if run.name in single] or ended_well
            chosen.sort(key=lambda run: str(run.record.get("started_at")), reverse=True)
            longest[recipe] = sorted(chosen, key=lambda run: -run.num_steps)
        return {recipe: runs for recipe, runs in longest.items() if runs}

    @cached_property
    def scatters(self) -> dict[ModelOnMachine, Scatter]:
        return find_scatters(self.store.runs)

    @cached_property
    def points(self) -> dict[Recipe, list[MeasuredPoint]]:
        steady = {
            recipe: sorted(
                (run for run in runs if run.is_ok and run.metrics is not None),
                key=lambda run: run.name,
            )
            for recipe, runs in self.runs.items()
        }
        return {recipe: pool(runs, self.scatters) for recipe, runs in steady.items()}

    @cached_property
    def curves(self) -> dict[Recipe, list[Curve]]:
        return {recipe: find_curves(runs, self.scatters) for recipe, runs in self.runs.items()}

    @cached_property
    def comparisons(self) -> dict[Recipe, list[StrategyComparison]]:
        store = self.store
        return {
            recipe: compare_strategies(
                runs,
                store.certificates,
                [cell for cell in store.cells if cell.outcome.recipe == recipe],
            )
            for recipe, runs in self.runs.items()
        }

    @cached_property
    def sweeps(self) -> list[SweepOfRecipe]:
        """By recipe, then by folder."""
        names = sweep_names(self.store)
        groups: dict[tuple[Recipe, str], list[Cell]] = {}
        for recipe in get_args(Recipe):
            for sweep in names:
                groups[recipe, sweep] = []
        for cell in self.store.cells:
            groups[cell.outcome.recipe, cell.sweep].append(cell)
        return [
            SweepOfRecipe(
                recipe=recipe, name=names[sweep], cells=sorted_cells(cells), scatters=self.scatters
            )
            for (recipe, sweep), cells in groups.items()
            if cells
        ]

    @cached_property
    def plots(self) -> dict[str, list[Plot]]:
        """The plots of each sweep by its slug."""
        return {sweep.slug: plots_of(sweep) for sweep in self.sweeps}
