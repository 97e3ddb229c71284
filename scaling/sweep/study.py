"""Defines a study: recipes, the axes that they are swept over, and the resulting cells.

Values are text as on a command line: `8`, `bf16-mixed`, `off`. The recipe interprets them.
"""

import functools
import hashlib
import itertools
import json
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from scaling.recipe_process import RESERVED_OPTIONS
from unitransformer.cli import read_integer, read_yaml, suggest
from unitransformer.config import Recipe
from unitransformer.record.units import format_count

RECIPES: tuple[Recipe, ...] = get_args(Recipe)
STUDIES = Path(__file__).parents[1] / "studies"  # built-in ones
FIELDS = ("recipe", "axes", "zip", "exclude", "options", "repeats")
MOST_REPEATS = 1000
AxisValues = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A recipe with one value of each axis."""

    recipe: Recipe
    options: Mapping[str, str]  # by name without leading dashes

    @functools.cached_property
    def id(self) -> str:
        """12 hexadecimal digits over recipe and options, independent of option order."""
        text = json.dumps([self.recipe, sorted(self.options.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def num_nodes(self) -> int:
        """The nodes that its options give; 1 if they give none that can be read."""
        meaning = _meaning(self.options.get("num-nodes", "1"))
        return meaning if isinstance(meaning, int) else 1

    @property
    def arguments(self) -> list[str]:
        """Arguments of the recipe's command line."""
        pairs = [part for name, value in self.options.items() for part in (f"--{name}", value)]
        return [*pairs, "--no-checkpoint"]

    @property
    def command(self) -> str:
        """The command that runs this cell alone."""
        return f"python -m recipes.{self.recipe} {shlex.join(self.arguments)}"

    def label(self, axes: Collection[str]) -> str:
        """Returns the recipe and its values on `axes`, for example "gpt, devices 2"."""
        values = (f"{name} {value}" for name, value in self.options.items() if name in axes)
        return ", ".join((self.recipe, *values))


@dataclass(frozen=True, kw_only=True)
class Study:
    """The recipes and axes of a sweep.

    Every combination of the values of all axes is a cell of each recipe. Zipped axes change
    together, and combinations that match an exclusion are left out. Raises ValueError for an empty
    grid, or inconsistent fields, naming field, value and fix.
    """

    recipes: Mapping[Recipe, Mapping[str, AxisValues]]  # with axes of this recipe alone
    axes: Mapping[str, AxisValues] = field(default_factory=dict)
    zipped: tuple[tuple[str, ...], ...] = ()
    excluded: tuple[Mapping[str, AxisValues], ...] = ()
    repeats: int = 1

    def __post_init__(self) -> None:
        if not self.recipes:
            raise ValueError(f"recipe is empty; give some of {', '.join(RECIPES)}")
        if not 1 <= self.repeats <= MOST_REPEATS:
            raise ValueError(f"repeats is {self.repeats}; it must be 1 to {MOST_REPEATS}")
        for recipe in self.recipes:
            self._check(recipe)
        if not self.cells():
            raise ValueError("the grid is empty: every combination is excluded")

    def _check(self, recipe: Recipe) -> None:
        axes = self._axes(recipe)
        for name, values in axes.items():
            if name in RESERVED_OPTIONS:
                raise ValueError(f"{name} is decided by the sweep for each cell; leave it out")
            if not values:
                raise ValueError(f"axis {name} is empty; give at least one value")
            if len(set(map(_meaning, values))) < len(values):
                raise ValueError(f"axis {name} is {','.join(values)}; give each value once")
        seen: set[str] = set()
        for group in self.zipped:
            for name in group:
                if name not in axes:
                    raise ValueError(f"zip names {name}, not an axis; {suggest(name, axes)}")
                if name in seen:
                    raise ValueError(f"zip names {name} twice; name each axis once")
                seen.add(name)
            if len({len(axes[name]) for name in group}) > 1:
                found = [f"{name} has {format_count(len(axes[name]), 'value')}" for name in group]
                raise ValueError(f"zip: {', '.join(found)}; zipped axes need equally many")
        known = ("recipe", *axes)
        for pattern in self.excluded:
            for name in pattern:
                if name not in known and not any(name in axes for axes in self.recipes.values()):
                    raise ValueError(f"exclude names {name}, not an axis; {suggest(name, known)}")

    def _axes(self, recipe: Recipe) -> dict[str, AxisValues]:
        return {**self.axes, **self.recipes[recipe]}

    def cells(self) -> list[Cell]:
        """Returns all cells, recipe by recipe; the last axis varies fastest."""
        return [cell for recipe in self.recipes for cell in self._cells(recipe)]

    def _cells(self, recipe: Recipe) -> Iterator[Cell]:
        axes = self._axes(recipe)
        groups = dict.fromkeys(
            next((group for group in self.zipped if name in group), (name,)) for name in axes
        )
        choices = [list(zip(*(axes[name] for name in group), strict=True)) for group in groups]
        for values in itertools.product(*choices):
            chain = itertools.chain.from_iterable
            chosen = dict(zip(chain(groups), chain(values), strict=True))
            options = {name: chosen[name] for name in axes}
            matched = {"recipe": recipe, **options}
            if not any(
                all(matched.get(name) in excluded for name, excluded in pattern.items())
                for pattern in self.excluded
            ):
                yield Cell(recipe=recipe, options=options)

    def values(self, axis: str) -> list[str]:
        """Returns the values of an axis over all recipes."""
        values = (self._axes(recipe).get(axis, ()) for recipe in self.recipes)
        return list(dict.fromkeys(itertools.chain.from_iterable(values)))

    def varied_axes(self) -> list[str]:
        """Returns the axes on which the cells of some recipe differ, in their order."""
        cells = {recipe: list(self._cells(recipe)) for recipe in self.recipes}
        return [
            name
            for name in dict.fromkeys(name for recipe in cells for name in self._axes(recipe))
            if any(len({cell.options.get(name) for cell in group}) > 1 for group in cells.values())
        ]

    def as_dict(self) -> dict[str, Any]:
        """Returns the study as plain values for JSON."""
        values = {"recipe": self.recipes, "axes": self.axes, "zip": self.zipped}
        values |= {"exclude": self.excluded, "repeats": self.repeats}
        return dict(json.loads(json.dumps(values)))


def list_studies() -> list[str]:
    """Returns the names of the built-in studies."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(name: str) -> Study:
    """Loads a built-in study by its name, or one from a YAML file; raises as `read_study`."""
    built_in = list_studies()
    path = STUDIES / f"{name}.yaml" if name in built_in else Path(os.path.expanduser(name))
    if not path.is_file():
        raise ValueError(
            f"study {name} is neither a file nor a built-in study; {suggest(name, built_in)}"
        )
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"study {name} is not YAML: {error}") from error
    try:
        return read_study(values)
    except ValueError as error:
        raise ValueError(f"study {name}: {error}") from error


def read_study(values: Any, *, is_narrowed: bool = False) -> Study:
    """Builds a study from the `FIELDS` of a YAML file; raises ValueError for an invalid field.

    Args:
        is_narrowed: a command line may have narrowed an axis, which leaves exclusions unmatched.
    """
    if not isinstance(values, Mapping):
        raise ValueError("it holds no fields of the form `axes: ...`")
    for name in values:
        if name not in FIELDS:
            raise ValueError(f"{name} is not a field; {suggest(str(name), FIELDS)}")
    recipes = values.get("recipe", ())
    if not isinstance(recipes, Mapping):
        recipes = {name: {} for name in _texts(recipes, "recipe")}
    for name in recipes:
        if name not in RECIPES:
            raise ValueError(f"recipe {name} is not known; {suggest(str(name), RECIPES)}")
    options = _axes(values.get("options", {}), "options")
    for name, chosen in options.items():
        if len(chosen) != 1:
            raise ValueError(f"options.{name} has {len(chosen)} values; make it an axis")
    excluded = values.get("exclude", ())
    zipped = values.get("zip", ())
    for name, given in (("exclude", excluded), ("zip", zipped)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise ValueError(f"{name} is {given!r}; it must be a list")
    try:
        repeats = read_integer(values.get("repeats", 1))
    except ValueError as error:
        raise ValueError(f"repeats is {error}") from None
    study = Study(
        recipes={name: _axes(axes or {}, f"recipe.{name}") for name, axes in recipes.items()},
        axes={**_axes(values.get("axes", {}), "axes"), **options},
        zipped=tuple(tuple(map(axis_name, _texts(group, "zip"))) for group in zipped),
        excluded=tuple(_axes(pattern, "exclude") for pattern in excluded),
        repeats=repeats,
    )
    for pattern in () if is_narrowed else study.excluded:
        for name, values in pattern.items():
            known = list(study.recipes) if name == "recipe" else study.values(name)
            for value in values:
                if value not in known:
                    raise ValueError(f"exclude.{name} holds {value}; {suggest(value, known)}")
    return study


def _meaning(value: str) -> int | float | str:
    """Returns the number that an option would read, so that 8, 8.0 and 0x8 are one value."""
    with suppress(ValueError):
        return read_integer(value)
    with suppress(ValueError):
        return float(value)
    return value


def axis_name(text: str) -> str:
    """Returns the name of an axis as a command line spells it: batch-size for batch_size."""
    return text.strip().replace("_", "-")


def _axes(values: Any, where: str) -> dict[str, AxisValues]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; it must be a group of `name: values`")
    return {
        axis_name(str(name)): _texts(chosen, f"{where}.{name}") for name, chosen in values.items()
    }


def _texts(values: Any, where: str) -> AxisValues:
    items = values if isinstance(values, list | tuple) else [values]
    if not all(isinstance(item, str | int | float | NoneType) for item in items):
        raise ValueError(f"{where} is {values!r}; it must be a value or a list of values")
    # As on a command line, null leaves an option out.
    return tuple("null" if item is None else str(item) for item in items)
