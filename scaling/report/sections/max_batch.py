"""The largest batch that fits memory, for every configuration of a sweep that ran out of it."""

from collections.abc import Sequence

from scaling.markdown import escaped
from scaling.report import run_formatting
from scaling.report.table_notes import draw
from scaling.store.outcome import AXIS, LACKS_MEMORY
from scaling.store.reader import Cell

WORDS = (
    "**Largest batch per device** that ran, and the smallest that did not fit, for configurations "
    "that ran out of memory; sizes between the two were not tried."
)


def limit_blocks(own: Sequence[Cell], axes: Sequence[str]) -> list[str]:
    """Args: own: in the order of the rows; axes: options in which they differ."""
    kept = [axis for axis in axes if axis != AXIS]
    groups: dict[tuple[str, ...], dict[int, list[Cell]]] = {}
    for cell in own:
        size = str(cell.outcome.options.get(AXIS, ""))
        if size.isdecimal():
            place = tuple(str(cell.outcome.options.get(axis, "default")) for axis in kept)
            groups.setdefault(place, {}).setdefault(int(size), []).append(cell)
    rows = [
        (*map(escaped, place), _largest(sizes), _smallest(sizes))
        for place, sizes in groups.items()
        if any(map(_lacks_memory, sizes.values()))
    ]
    if not rows:
        return []
    heads = (*kept, "fits", "does not fit")
    columns = {head: [row[i] for row in rows] for i, head in enumerate(heads)}
    return [WORDS, *draw(columns, ("fits", "does not fit"))]


def _lacks_memory(launches: Sequence[Cell]) -> bool:
    return any(cell.outcome.status in LACKS_MEMORY for cell in launches)


def _largest(sizes: dict[int, list[Cell]]) -> str:
    fits = {
        size: cell.run
        for size, launches in sizes.items()
        for cell in launches
        if cell.run is not None and cell.outcome.status == "ok"
    }
    if not fits:
        return "none of those tried"
    return f"{max(fits):,}, {run_formatting.record(fits[max(fits)])}"


def _smallest(sizes: dict[int, list[Cell]]) -> str:
    size = min(size for size, launches in sizes.items() if _lacks_memory(launches))
    statuses = dict.fromkeys(cell.outcome.status for cell in sizes[size])
    return f"{size:,}, {' and '.join(statuses)}"
