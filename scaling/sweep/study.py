"""A study: recipes and the axes they are swept over in; the cells of the sweep out.

Values are words, as a command line has them: `8`, `bf16-mixed`, `off`. What they mean is for the
recipe to say.
"""

import functools
import hashlib
import itertools
import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml

from unitransformer.cli import suggest
from unitransformer.config import Recipe
from unitransformer.record.units import count

RECIPES: tuple[Recipe, ...] = get_args(Recipe)
# What a sweep decides for each of its cells.
RESERVED_OPTIONS = (
    *("out", "record", "checkpoint-dir", "checkpoint-every", "no-checkpoint", "resume"),
    *("repeats", "trace", "summary", "dry-run", "config", "print_config", "help"),
)
FIELDS = ("recipe", "axes", "zip", "exclude", "options", "repeats")
AxisValues = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to run one recipe."""

    recipe: Recipe
    options: Mapping[str, str]  # by name without dashes in front

    @functools.cached_property
    def id(self) -> str:
        """12 hexadecimal digits over recipe and options, whatever their order."""
        said = json.dumps([self.recipe, sorted(self.options.items())])
        return hashlib.sha256(said.encode()).hexdigest()[:12]

    @property
    def arguments(self) -> list[str]:
        """For the recipe's command line."""
        words = [word for name, value in self.options.items() for word in (f"--{name}", value)]
        return [*words, "--no-checkpoint"]

    @property
    def command(self) -> str:
        """What a person types to run it alone."""
        return f"python -m recipes.{self.recipe} {shlex.join(self.arguments)}"

    def label(self, axes: Collection[str]) -> str:
        """What tells it from its neighbours: the recipe, and its values on these axes."""
        told = (f"{name} {value}" for name, value in self.options.items() if name in axes)
        return ", ".join((self.recipe, *told))


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is swept.

    Every combination of the values of all axes is a cell of each recipe, except that axes zipped
    together move together, and that what matches an exclusion is left out.

    Raises:
        ValueError: an empty grid, or parts that do not fit each other, naming field, value and fix.
    """

    recipes: Mapping[Recipe, Mapping[str, AxisValues]]  # with axes and options of its own
    axes: Mapping[str, AxisValues] = field(default_factory=dict)
    zipped: tuple[tuple[str, ...], ...] = ()
    excluded: tuple[Mapping[str, AxisValues], ...] = ()
    repeats: int = 1

    def __post_init__(self) -> None:
        if not self.recipes:
            raise ValueError(f"recipe is empty; give some of {', '.join(RECIPES)}")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; it must be at least 1")
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
            if len(set(values)) < len(values):
                raise ValueError(f"axis {name} is {','.join(values)}; give each value once")
        seen: set[str] = set()
        for group in self.zipped:
            for name in group:
                if name not in axes:
                    raise ValueError(f"zip names {name}, no axis; {suggest(name, axes)}")
                if name in seen:
                    raise ValueError(f"zip names {name} twice; an axis moves with one group")
                seen.add(name)
            lengths = {name: len(axes[name]) for name in group}
            if len(set(lengths.values())) > 1:
                told = ", ".join(f"{name} has {count(n, 'value')}" for name, n in lengths.items())
                raise ValueError(f"zip: {told}; axes that move together need equally many")
        known = ("recipe", *axes)
        for pattern in self.excluded:
            for name in pattern:
                if name not in known and not any(name in own for own in self.recipes.values()):
                    raise ValueError(f"exclude names {name}, no axis; {suggest(name, known)}")

    def _axes(self, recipe: Recipe) -> dict[str, AxisValues]:
        return {**self.axes, **self.recipes[recipe]}

    def cells(self) -> list[Cell]:
        """All cells, recipe by recipe, the last axis running fastest."""
        return [cell for recipe in self.recipes for cell in self._cells(recipe)]

    def _cells(self, recipe: Recipe) -> Iterator[Cell]:
        axes = self._axes(recipe)
        groups: list[tuple[str, ...]] = []
        for name in axes:
            group = next((group for group in self.zipped if name in group), (name,))
            if group not in groups:
                groups.append(group)
        choices = [
            [
                dict(zip(group, values, strict=True))
                for values in zip(*(axes[name] for name in group), strict=True)
            ]
            for group in groups
        ]
        for parts in itertools.product(*choices):
            chosen = {name: value for part in parts for name, value in part.items()}
            options = {name: chosen[name] for name in axes}
            if not any(_matches(pattern, recipe, options) for pattern in self.excluded):
                yield Cell(recipe=recipe, options=options)

    def values(self, axis: str) -> list[str]:
        """Of an axis, those of all recipes together."""
        own = [self._axes(recipe).get(axis, ()) for recipe in self.recipes]
        return list(dict.fromkeys(value for values in own for value in values))

    def varied(self) -> list[str]:
        """Axes on which some recipe has more than one value, in their order."""
        names = dict.fromkeys(name for recipe in self.recipes for name in self._axes(recipe))
        return [
            name for name in names if any(self._varies(name, recipe) for recipe in self.recipes)
        ]

    def _varies(self, name: str, recipe: Recipe) -> bool:
        return len({cell.options.get(name) for cell in self._cells(recipe)}) > 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values that say the same study."""
        return {
            "recipe": {
                recipe: {name: list(values) for name, values in own.items()}
                for recipe, own in self.recipes.items()
            },
            "axes": {name: list(values) for name, values in self.axes.items()},
            "zip": [list(group) for group in self.zipped],
            "exclude": [
                {name: list(values) for name, values in pattern.items()}
                for pattern in self.excluded
            ],
            "repeats": self.repeats,
        }


def _matches(pattern: Mapping[str, AxisValues], recipe: str, options: Mapping[str, str]) -> bool:
    own = {"recipe": recipe, **options}
    return all(own.get(name) in values for name, values in pattern.items())


# ---------------------------------------------------------------------------------- files


def list_studies() -> list[str]:
    """Names of the studies that come with the suite."""
    found = resources.files("scaling").joinpath("studies").iterdir()
    return sorted(Path(file.name).stem for file in found if file.name.endswith(".yaml"))


def load_study(name: str) -> Study:
    """A study by its name, or from a YAML file of one's own.

    Raises:
        ValueError: no such study or file, or a field that is unknown or of another form.
    """
    if name in list_studies():
        text = resources.files("scaling").joinpath("studies", f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"study {name} is neither a file nor known; {suggest(name, list_studies())}"
        )
    try:
        # Every scalar stays a word: YAML would make `off` false and `1_000` a number.
        values = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"study {name} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return read_study(values)
    except ValueError as error:
        raise ValueError(f"study {name}: {error}") from error


def read_study(values: Any) -> Study:
    """A study out of plain values: `recipe`, and any of `axes`, `zip`, `exclude`, `options`,
    `repeats`; raises ValueError as `Study` does, and for fields of another form."""
    if not isinstance(values, Mapping):
        raise ValueError("it holds no fields of the form `axes: ...`")
    for name in values:
        if name not in FIELDS:
            raise ValueError(f"{name} is not a field; {suggest(str(name), FIELDS)}")
    recipes = values.get("recipe", ())
    if not isinstance(recipes, Mapping):
        recipes = {name: {} for name in _words(recipes, "recipe")}
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
    study = Study(
        recipes={name: _axes(own or {}, f"recipe.{name}") for name, own in recipes.items()},
        axes={**_axes(values.get("axes", {}), "axes"), **options},
        zipped=tuple(_words(group, "zip") for group in zipped),
        excluded=tuple(_axes(pattern, "exclude") for pattern in excluded),
        repeats=_whole(values.get("repeats", "1")),
    )
    _check_exclusions(study)
    return study


def _check_exclusions(study: Study) -> None:
    """Raises ValueError for a value that no axis has. Of a study as it is written: a command line
    that narrows its axes may leave exclusions without a match."""
    for pattern in study.excluded:
        for name, values in pattern.items():
            known = list(study.recipes) if name == "recipe" else study.values(name)
            for value in values:
                if value not in known:
                    raise ValueError(f"exclude.{name} holds {value}; {suggest(value, known)}")


def _axes(values: Any, where: str) -> dict[str, AxisValues]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; it must be a group of `name: values`")
    return {
        str(name).replace("_", "-"): _words(chosen, f"{where}.{name}")
        for name, chosen in values.items()
    }


def _words(values: Any, where: str) -> AxisValues:
    """One word, or a list of them."""
    if isinstance(values, str | int | float):
        return (str(values),)
    if not isinstance(values, Sequence) or not all(
        isinstance(value, str | int | float) for value in values
    ):
        raise ValueError(f"{where} is {values!r}; it must be a word or a list of words")
    return tuple(map(str, values))


def _whole(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"repeats is {value!r}; it must be an integer") from None
