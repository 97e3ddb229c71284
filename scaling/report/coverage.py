"""Finds which cells of a study have not ended, and describes them in few words."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scaling.analysis.same_work import options_of_configuration, options_of_work
from scaling.report.run_formatting import TITLES
from scaling.store.reader import Cell as MeasuredCell
from scaling.store.reader import Store
from scaling.sweep.study import Cell, Study, read_study
from unitransformer.record.units import format_count

MOST_GROUPS = 4  # of the missing cells of a recipe, before the rest is only counted
MOST_AXES = 3  # that describe a group

Group = Mapping[str, tuple[str, ...]]  # values by axis


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of a study has ended, well or not."""

    study: Study
    cells: Sequence[MeasuredCell]  # of its sweep

    @property
    def missing(self) -> list[Cell]:
        """The cells without any outcome."""
        ended = {cell.outcome.cell for cell in self.cells}
        return [cell for cell in self.study.cells() if cell.id not in ended]

    def describe(self) -> str:
        """Returns how much has ended, how much of it failed, and what is missing; empty if nothing
        is missing. More launches of a cell than the study asks for stand for no other cell."""
        planned = self.study.cells()
        statuses: dict[str, dict[str, str]] = {cell.id: {} for cell in planned}  # by launch
        for cell in self.cells:
            if cell.outcome.cell in statuses:
                statuses[cell.outcome.cell][cell.outcome.name] = cell.outcome.status
        launches = sum(min(len(ended), self.study.repeats) for ended in statuses.values())
        num_launches = len(planned) * self.study.repeats
        if launches == num_launches:
            return ""
        missing = self.missing
        text = f"{len(planned) - len(missing)} of {format_count(len(planned), 'cell')} ended"
        text = text if missing else "every cell has an outcome"
        failed = [set(ended.values()) for ended in statuses.values() if ended]
        if failed := [kinds for kinds in failed if "ok" not in kinds]:
            how = ", ".join(sorted(set.union(*failed)))
            text += f", {len(failed)} of them without success ({how})"
        parts = []
        for recipe in self.study.recipes:
            of_recipe = [cell for cell in missing if cell.recipe == recipe]
            total = [cell for cell in planned if cell.recipe == recipe]
            if len(of_recipe) == len(total) > 0:
                parts.append(f"all {len(total)} of {TITLES[recipe]}")
            elif of_recipe:
                groups = describe_groups(of_recipe, total)
                parts.append(f"{len(of_recipe)} of {TITLES[recipe]} ({groups})")
        text += f"; missing: {', '.join(parts)}" if parts else ""
        if self.study.repeats > 1:
            planned_ones = format_count(num_launches, "planned launch", "planned launches")
            text += f"; {num_launches - launches} of {planned_ones} did not run"
        return text


def count_others(found: Collection[Coverage], names: Iterable[str]) -> tuple[int, int]:
    """Returns how many other configurations do the work of the records `names`, in the studies of
    all sweeps together: all of them, and those that have ended in no sweep."""
    records = set(names)
    cells = [cell for coverage in found for cell in coverage.cells]
    outcomes = [c.outcome for c in cells if c.run is not None and c.run.name in records]
    works = {_key(o.recipe, options_of_work(o.options)) for o in outcomes}
    planned = {
        _key(cell.recipe, options_of_configuration(cell.options))
        for coverage in (found if works else ())
        for cell in coverage.study.cells()
        if _key(cell.recipe, options_of_work(cell.options)) in works
    }
    others = planned - {_key(o.recipe, options_of_configuration(o.options)) for o in outcomes}
    ended = {
        _key(cell.outcome.recipe, options_of_configuration(cell.outcome.options)) for cell in cells
    }
    return len(others), len(others - ended)


def _key(recipe: str, options: Mapping[str, object]) -> tuple[str, ...]:
    return recipe, *sorted(f"{name}={value}" for name, value in options.items())


def find_coverage(store: Store) -> tuple[dict[str, Coverage], dict[str, str]]:
    """Returns the coverage of each sweep with a study, and why others have none; by folder."""
    cells: dict[str, list[MeasuredCell]] = {}
    for cell in store.cells:
        cells.setdefault(cell.sweep, []).append(cell)
    found, unread = {}, {}
    for folder, values in store.studies.items():
        try:
            study = read_study(values, is_narrowed=True)
        except ValueError as error:
            unread[folder] = f"its study cannot be read: {error}"
        else:
            found[folder] = Coverage(study=study, cells=cells.get(folder, []))
    return found, unread


def describe_groups(missing: Sequence[Cell], planned: Sequence[Cell]) -> str:
    """Describes the missing cells of a recipe by the values that they share, the largest group
    first: "strategy ddp or fsdp, batch-size 4; devices 2".

    A group holds no cell that has ended.
    """
    axes = [name for name in planned[0].options if len({c.options.get(name) for c in planned}) > 1]
    candidates = _candidates(missing, planned, axes)
    left, texts = list(missing), list[str]()
    while left and len(texts) < MOST_GROUPS:
        best = max(candidates, key=lambda group: (sum(_holds(group, c) for c in left), -len(group)))
        texts.append(
            ", ".join(f"{name} {' or '.join(best[name])}" for name in axes if name in best)
        )
        left = [cell for cell in left if not _holds(best, cell)]
    if left:
        texts.append(f"and {len(left)} more")
    return "; ".join(texts)


def _candidates(
    missing: Sequence[Cell], planned: Sequence[Cell], axes: Sequence[str]
) -> list[Group]:
    """Returns groups of missing cells: as few axes as possible, with one value each, and those
    that differ in the value of one axis joined; and each cell alone."""
    groups: dict[tuple[tuple[str, str], ...], None] = {}
    for size in range(1, min(MOST_AXES, len(axes)) + 1):
        for names in itertools.combinations(axes, size):
            totals = Counter(_values(cell, names) for cell in planned)
            for values, count in Counter(_values(cell, names) for cell in missing).items():
                smaller = itertools.combinations(values, size - 1) if size > 1 else ()
                if count == totals[values] and not any(part in groups for part in smaller):
                    groups[values] = None
    joined: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for values in groups:
        for name, value in values:
            others = tuple(pair for pair in values if pair[0] != name)
            joined.setdefault((name, others), []).append(value)
    return [
        *({name: tuple(several), **_single(others)} for (name, others), several in joined.items()),
        *(_single(_values(cell, axes)) for cell in missing),
    ]


def _single(values: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    return {name: (value,) for name, value in values}


def _values(cell: Cell, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, cell.options[name]) for name in names if name in cell.options)


def _holds(group: Group, cell: Cell) -> bool:
    return all(cell.options.get(name) in values for name, values in group.items())
