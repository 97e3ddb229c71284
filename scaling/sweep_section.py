"""Sweeps in the report: cells in, a table of every cell out, those that failed too."""

from collections.abc import Sequence

from scaling import cells
from scaling.certificates import Certificate
from scaling.conditions import apart, without_places
from scaling.joining import without_threads
from scaling.markdown import code_block, count, escaped, gib, ms, table
from scaling.parity_section import parity_cell
from scaling.store import Cell, Run
from scaling.sweep_plots import not_drawn
from unitransformer.config import Recipe
from unitransformer.memory import rank_bytes
from unitransformer.passport import Row
from unitransformer.tasks import rate_in_words

LONGEST_REASON = 160  # letters in a table; the outcome has all of them
WORDS = (
    "Speed is of all devices together at the median steady step, with the 95 % interval, then over "
    "all steady steps with their stalls; FLOPs, "
    "MFU and the share of the machine's own ceiling are those of the `matmul` convention; memory "
    "is the largest peak of a rank, beside what states and activations need by formula. A record "
    "holds the raw samples of its row."
)
HEADS = (
    *("status", "speed", "over all steps", "samples", "a device", "median step", "FLOPs", "MFU"),
    "of the ceiling",
    *("peak memory", "by formula", "loss parity", "remarks", "record"),
)


def sweep_blocks(
    name: str,
    own: Sequence[Cell],
    certificates: Sequence[Certificate],
    plots: Sequence[tuple[str, str]],
) -> list[str]:
    """Blocks on the cells that one recipe has in one sweep.

    Args:
        name: of the sweep.
        plots: what each shows, and its link.
    """
    ordered = in_order(own)
    axes = varied(ordered)
    rows = [(*_place(cell, axes), *_figures(cell, certificates)) for cell in ordered]
    return [
        f"### Sweep {escaped(name)}",
        f"{count(len(own), 'cell')}: {_statuses(own)}. {WORDS}",
        *filter(None, [apart([without_threads(run.record) for run in _ok(own)])]),
        table((*axes, *HEADS), rows),
        *filter(None, [_without_mfu(_ok(own))]),
        *(f"![{title}]({link_})" for title, link_ in plots),
        *filter(None, [not_drawn(own) if plots else ""]),
        _commands(ordered, axes),
    ]


def _ok(own: Sequence[Cell]) -> list[Run]:
    return [cell.run for cell in own if cell.run is not None and cell.run.is_ok]


def _without_mfu(runs: Sequence[Run]) -> str:
    """Why the column is blank, each reason once."""
    rows = [_row(run) for run in runs if run.readout is not None]
    reasons = dict.fromkeys(str(row.reason) for row in rows if row.utilisation is None)
    return f"No MFU: {escaped('; '.join(reasons))}." if reasons else ""


def _row(run: Run) -> Row:
    return next(row for row in run.passport if row.convention == cells.CONVENTION)


def varied(own: Sequence[Cell]) -> list[str]:
    """Options in which cells differ, in the order in which they are told; then the repeat."""
    names = dict.fromkeys(name for cell in own for name in cell.outcome.options)
    told = [name for name in names if len({cell.outcome.options.get(name) for cell in own}) > 1]
    return [*told, *(["repeat"] if len({cell.outcome.repeat for cell in own}) > 1 else [])]


def in_order(own: Sequence[Cell]) -> list[Cell]:
    """By the values of the options, numbers as numbers, then by repeat."""
    axes = [axis for axis in varied(own) if axis != "repeat"]
    return sorted(
        own,
        key=lambda cell: (
            [_sortable(cell.outcome.options.get(axis, "")) for axis in axes],
            cell.outcome.repeat,
            cell.name,
        ),
    )


def _sortable(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


def _statuses(own: Sequence[Cell]) -> str:
    statuses = [cell.outcome.status for cell in own]
    return ", ".join(f"{statuses.count(s)} {s}" for s in sorted(set(statuses), key=_ok_first))


def _ok_first(status: str) -> tuple[bool, str]:
    return status != "ok", status


def _place(cell: Cell, axes: Sequence[str]) -> list[str]:
    told = {**cell.outcome.options, "repeat": str(cell.outcome.repeat)}
    return [escaped(told.get(axis, "by default")) for axis in axes]


def _figures(cell: Cell, certificates: Sequence[Certificate]) -> tuple[str, ...]:
    run, outcome = cell.run, cell.outcome
    if run is None or not run.is_ok or outcome.status != "ok":
        reason = without_places(outcome.reason or "not told", [])
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]}…"
        if outcome.status == "ok":
            reason = "its record is missing or damaged"
        record = "none" if run is None else cells.record(run)
        needed = gib(rank_bytes(outcome.config)) if outcome.config else ""
        blank = [""] * (len(HEADS) - 5)
        return (outcome.status, *blank, needed, "", escaped(reason), record)
    row = _row(run)
    return (
        outcome.status,
        cells.speed(run),
        _over_all(run),
        _samples(run),
        _per_device(run),
        "" if run.readout is None else ms(run.readout.step.median),
        cells.flops(run.config),
        "" if row.utilisation is None else f"{row.utilisation:.1%}",
        "" if row.share_of_ceiling is None else f"{row.share_of_ceiling:.1%}",
        _peak(run),
        gib(rank_bytes(run.config)),
        parity_cell(run, certificates),
        cells.flags(run),
        cells.record(run),
    )


def _over_all(run: Run) -> str:
    return (
        "" if run.readout is None else rate_in_words(run.readout.mean_units_per_s, f"{run.unit}s")
    )


def _samples(run: Run) -> str:
    if run.readout is None:
        return ""
    per_s = run.config.global_batch_size / run.readout.step.median
    return rate_in_words(per_s, "samples" if run.unit == "token" else "images")


def _per_device(run: Run) -> str:
    if run.units_per_s is None:
        return ""
    return rate_in_words(run.units_per_s / run.config.parallel.world_size, f"{run.unit}s")


def _peak(run: Run) -> str:
    peaks = [peak for peak in run.record["peak_bytes"] if peak is not None]
    return gib(max(peaks)) if peaks else "blank: no step could be watched"


def _commands(own: Sequence[Cell], axes: Sequence[str]) -> str:
    recipe: Recipe = own[0].outcome.recipe
    lines = [
        f"# {', '.join(f'{a} {v}' for a, v in zip(axes, _plain(cell, axes), strict=True))}\n"
        f"{cell.outcome.command}"
        for cell in own
    ]
    title = f"Commands of the {count(len(own), 'cell')} of {cells.TITLES[recipe]}"
    block = code_block("\n".join(lines), "sh")
    return f"<details>\n<summary>{title}</summary>\n\n{block}\n\n</details>"


def _plain(cell: Cell, axes: Sequence[str]) -> list[str]:
    told = {**cell.outcome.options, "repeat": str(cell.outcome.repeat)}
    return [told.get(axis, "by default") for axis in axes]
