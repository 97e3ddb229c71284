"""Shows predictions beside what was measured: the error so far, and every configuration."""

from collections.abc import Sequence
from statistics import median
from typing import get_args

from scaling.markdown import escaped, link
from scaling.prediction.held_out import HeldOut
from scaling.prediction.measured_rows import PARTS
from scaling.prediction.predict import Interval
from scaling.report import run_formatting
from scaling.report.run_formatting import TITLES
from scaling.report.staleness import MARK
from scaling.report.store_analysis import StoreAnalysis
from scaling.report.table_notes import conditions_of_rows, differing, draw
from scaling.store.conditions import without_threads
from unitransformer.config import Recipe
from unitransformer.costs.flops import count_parameters
from unitransformer.record.units import format_bytes, format_rate

HOW = (
    "No row is used for its own prediction: the configurations of a machine are divided into "
    f"{PARTS} parts, and each part is predicted by a fit to the others. Memory is computed, not "
    "fitted. An error is the predicted value over the measured one, less 1; outside the 90% "
    "interval it is bold. A speed measured in several launches is that of the median of their step "
    "times."
)
STALE = (
    f"Rows with {MARK} after the record are stale: no fit uses them, and the error so far does not "
    "count them."
)
# Settings that have columns of their own.
SHOWN = (
    *("recipe", "parallel.strategy", "parallel.precision", "parallel.devices"),
    *("parallel.num_nodes", "parallel.accelerator", "batch_size", "accumulate"),
)


def predictions_summary(analysis: StoreAnalysis, page: str) -> list[str]:
    """Returns the error so far, and the longest run of each recipe; nothing without predictions.

    Args:
        page: a link to the page with all rows.
    """
    found, _ = analysis.predictions
    if not found:
        return []
    longest = [runs[0] for runs in analysis.longest_runs.values()]
    rows = [
        {"run": f"{TITLES[item.config.recipe]} {escaped(item.run.config.size)}"}
        | _row(item)
        | {"record": _record(item)}
        for run in longest
        for item in found
        if run in item.runs
    ]
    table = draw(rows, always=("run", "speed", *ERRORS)) if rows else []
    return [
        "## Predicted and measured",
        f"**{error_so_far(found)}** All rows: {page}.",
        _errors_of_recipes(found),
        HOW,
        *_about_stale(found),
        *table,
    ]


def predictions_page(analysis: StoreAnalysis) -> list[str]:
    """Returns every configuration with its prediction, one table for each recipe."""
    found, reasons = analysis.predictions
    if not found:
        return []
    blocks = [f"**{error_so_far(found)}**", HOW, *_about_stale(found)]
    blocks += [escaped(f"{reason}.") for reason in reasons]
    for recipe in get_args(Recipe):
        if items := [item for item in found if item.config.recipe == recipe]:
            blocks += _table(recipe, sorted(items, key=_place))
    return blocks


def _about_stale(found: Sequence[HeldOut]) -> list[str]:
    return [STALE] if any(item.is_stale for item in found) else []


def _errors_of_recipes(found: Sequence[HeldOut]) -> str:
    """Returns the sentence of each recipe; nothing if only one was measured."""
    recipes = [name for name in get_args(Recipe) if any(i.config.recipe == name for i in found)]
    if len(recipes) < 2:
        return ""
    of_recipe = {name: [i for i in found if i.config.recipe == name] for name in recipes}
    return "\n".join(f"- {error_so_far(of_recipe[name], TITLES[name])}" for name in recipes)


def error_so_far(predictions: Sequence[HeldOut], of: str = "Error so far") -> str:
    """Returns one sentence: median errors, and how many values the intervals cover.

    Stale configurations are not counted.

    Args:
        of: begins the sentence.
    """
    found = [item for item in predictions if not item.is_stale]
    if not found:
        return f"{of}: none, as all records are stale."
    inside = sum(item.is_speed_inside for item in found)
    errors = [abs(item.speed_error) for item in found]
    text = f"{of}: median {median(errors):.1%} of the speed"
    covered = f"90% intervals cover {inside:,} of {len(found):,} speeds"
    if counted := [item for item in found if item.memory_error is not None]:
        memory = [abs(item.memory_error or 0.0) for item in counted]
        text += f" and {median(memory):.1%} of the peak memory"
        known = [item.is_memory_inside for item in counted]
        known = [is_inside for is_inside in known if is_inside is not None]
        covered += f" and {known.count(True):,} of {len(known):,} peaks" if known else ""
    return f"{text}; {covered}."


def _place(item: HeldOut) -> tuple[object, ...]:
    config, parallel = item.config, item.config.parallel
    shape = (count_parameters(config.model), parallel.world_size, parallel.strategy)
    return (*shape, parallel.precision, config.global_batch_size, item.run.name)


def _table(recipe: Recipe, items: Sequence[HeldOut]) -> list[str]:
    settings = differing([item.config for item in items], SHOWN)
    rows = []
    for number, item in enumerate(items):
        run = item.run
        row = {"devices": run_formatting.devices(run), "precision": run.config.parallel.precision}
        row |= {"batch": run_formatting.batch(run)}
        row |= {name: cells[number] for name, cells in settings.items()}
        rows.append(
            row | {"launches": str(len(item.runs))} | _row(item) | {"record": _record(item)}
        )
    records = [without_threads(item.run.record) for item in items]
    return [
        f"## {TITLES[recipe]}",
        f"{error_so_far(items)}",
        *conditions_of_rows(records),
        *draw(rows, always=("speed", *ERRORS)),
    ]


ERRORS = ("error", "error of memory")


def _row(item: HeldOut) -> dict[str, str]:
    units, unit = item.run.units_per_step, f"{item.run.unit}s"
    step = item.step_s
    speeds = Interval(value=units / step.value, low=units / step.high, high=units / step.low)
    row = {
        "speed": format_rate(units / item.measured_s, unit),
        "predicted, 90%": _with_ends([format_rate(v, unit) for v in _values(speeds)]),
        "error": _error(item.speed_error, item.is_speed_inside),
    }
    if item.measured_bytes is None or item.memory_bytes is None or item.memory_error is None:
        return row | {"peak memory": "not measured"}
    memory = [format_bytes(round(value)) for value in _values(item.memory_bytes)]
    return row | {
        "peak memory": format_bytes(item.measured_bytes),
        "predicted memory, 90%": _with_ends(memory),
        "error of memory": _error(item.memory_error, item.is_memory_inside is not False),
    }


def _values(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _with_ends(texts: Sequence[str]) -> str:
    """Returns "2.1 GiB (2.0 to 2.2)"; without ends that add nothing."""
    value, low, high = texts
    if len({text.split()[-1] for text in texts}) == 1:  # all of one unit
        low, high = low.split()[0], high.split()[0]
    return value if low == high else f"{value} ({low} to {high})"


def _error(error: float, is_inside: bool) -> str:
    return f"{error:+.1%}" if is_inside else f"**{error:+.1%}**"


def _record(item: HeldOut) -> str:
    return link(item.run.name, "record")
