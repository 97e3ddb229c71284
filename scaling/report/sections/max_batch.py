"""The largest batch that fits memory, for every configuration of a sweep that ran out of it."""

from collections.abc import Mapping, Sequence

from scaling.markdown import escaped
from scaling.report import run_formatting
from scaling.report.sweeps import SweepOfRecipe, successful_run
from scaling.report.table_notes import draw
from scaling.store.outcome import AXIS, OUT_OF_MEMORY
from scaling.store.reader import Cell

INTRODUCTION = (
    "**Largest batch per device** that ran, and the smallest that did not fit, for configurations "
    "that ran out of memory; sizes between the two were not tried."
)

Sizes = Mapping[int, Sequence[Cell]]  # launches by batch size


def limit_blocks(sweep: SweepOfRecipe) -> list[str]:
    axes = [axis for axis in sweep.axes if axis != AXIS]
    groups: dict[tuple[str, ...], dict[int, list[Cell]]] = {}
    for cell in sweep.cells:
        size = str(cell.outcome.options.get(AXIS, ""))
        if size.isdecimal():
            place = tuple(str(cell.outcome.options.get(axis, "default")) for axis in axes)
            groups.setdefault(place, {}).setdefault(int(size), []).append(cell)
    rows = [
        {axis: escaped(value) for axis, value in zip(axes, place, strict=True)}
        | {"fits": _largest(sizes), "does not fit": _smallest(sizes)}
        for place, sizes in groups.items()
        if any(map(_is_out_of_memory, sizes.values()))
    ]
    return [INTRODUCTION, *draw(rows, always=("fits", "does not fit"))] if rows else []


def _is_out_of_memory(launches: Sequence[Cell]) -> bool:
    return any(cell.outcome.status in OUT_OF_MEMORY for cell in launches)


def _largest(sizes: Sizes) -> str:
    fits = {
        size: run
        for size, launches in sizes.items()
        for cell in launches
        if (run := successful_run(cell)) is not None
    }
    if not fits:
        return "none of those tried"
    return f"{max(fits):,}, {run_formatting.record(fits[max(fits)])}"


def _smallest(sizes: Sizes) -> str:
    size = min(size for size, launches in sizes.items() if _is_out_of_memory(launches))
    statuses = dict.fromkeys(cell.outcome.status for cell in sizes[size])
    return f"{size:,}, {' and '.join(statuses)}"
