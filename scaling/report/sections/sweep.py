"""Sweeps in the report: cells in, a table of every cell out, those that failed too."""

from collections.abc import Sequence
from typing import get_args

from scaling.analysis.efficiency import Curve, Scaling, find_curves
from scaling.markdown import code_block, count, escaped
from scaling.parity.certificate import Certificate
from scaling.report import run_formatting
from scaling.report.environment import apart, without_places
from scaling.report.plots import not_drawn
from scaling.report.sections.max_batch import limit_blocks
from scaling.report.sections.parity import parity_cell
from scaling.report.table_notes import Columns, draw, figure, shape_in_words
from scaling.store.conditions import without_threads
from scaling.store.reader import Cell
from scaling.store.run import Run
from unitransformer.config import Recipe
from unitransformer.costs.memory import rank_bytes
from unitransformer.record.units import gib, ms, rate_in_words, si

LONGEST_REASON = 160  # letters in a table; the outcome has all of them
LONGEST_SHARED = 80  # letters of an option that all cells share
WORDS = (
    "Speed is of all devices together at the median steady step, with the 95 % interval, then over "
    "all steady steps with their stalls; FLOPs, FLOP/s, MFU and the share of the machine's own "
    "ceiling are those of the `matmul` convention; memory is the largest peak of a rank, beside "
    "what states and activations need by formula. Efficiency is of all launches of a cell, strong "
    "at the same global batch, weak at the same batch a device. A record holds the raw samples of "
    "its row."
)
SAME_CORES = " (same cores: 1/n loses nothing)"


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
    return [
        heading(name),
        f"{count(len(own), 'cell')}: {_statuses(own)}. {WORDS}",
        *filter(None, [_shared(ordered, axes)]),
        *filter(None, [apart([without_threads(run.record) for run in _ok(own)])]),
        draw(_columns(ordered, axes, certificates)),
        *filter(None, [_without_mfu(_ok(own))]),
        *limit_blocks(ordered, axes),
        *(f"![{title}]({link_})" for title, link_ in plots),
        *filter(None, [not_drawn(own) if plots else ""]),
        _commands(ordered, axes),
    ]


def heading(name: str) -> str:
    """Of the section of a sweep."""
    return f"### Sweep {escaped(name)}"


def _shared(own: Sequence[Cell], axes: Sequence[str]) -> str:
    """What all cells have in common: the model, and the options that were given."""
    told = sorted({shape_in_words(run.config.model) for run in _ok(own)})
    model = [f"a model of {told[0]}"] if len(told) == 1 else []
    options = own[0].outcome.options
    given = [
        f"{name} {value}"
        for name, value in options.items()
        if name not in axes and len(str(value)) <= LONGEST_SHARED
    ]
    return (
        f"All cells: {escaped(without_places(', '.join([*model, *given]), []))}." if given else ""
    )


def _columns(
    own: Sequence[Cell], axes: Sequence[str], certificates: Sequence[Certificate]
) -> Columns:
    """Every cell a row; columns that are empty in all rows are left out."""
    curves = find_curves(_ok(own))
    efficient = _efficiencies(curves)
    rows = [
        _figures(cell, certificates) | efficient.get("" if cell.run is None else cell.run.name, {})
        for cell in own
    ]
    places = [_place(cell, axes) for cell in own]
    return {
        **{axis: [place[index] for place in places] for index, axis in enumerate(axes)},
        **{
            head: [row.get(head, "") for row in rows]
            for head in _heads(curves)
            if any(row.get(head, "") not in ("", "none") for row in rows)
        },
    }


def _heads(curves: Sequence[Curve]) -> list[str]:
    """In the order of the table."""
    return [
        *("status", "speed", "over all steps", "samples", "a device", "median step", "FLOPs"),
        *("FLOP/s a device", "MFU", "of the ceiling", "peak memory", "by formula"),
        *(_efficiency_head(scaling, curves) for scaling in get_args(Scaling)),
        *("loss parity", "remarks", "record"),
    ]


def _efficiency_head(scaling: Scaling, curves: Sequence[Curve]) -> str:
    is_split = any(curve.threads for curve in curves if curve.scaling == scaling)
    return f"{scaling} efficiency{SAME_CORES * is_split}"


def _efficiencies(curves: Sequence[Curve]) -> dict[str, dict[str, str]]:
    """Cells by head, by the name of the run."""
    told: dict[str, dict[str, str]] = {}
    heads = {scaling: _efficiency_head(scaling, curves) for scaling in get_args(Scaling)}
    for curve in curves:
        head = heads[curve.scaling]
        for point in curve.points:
            is_first = point is curve.baseline
            own = "baseline" if is_first else figure(curve.efficiency(point), "{:.1%}")
            for run in point.runs:
                told.setdefault(run.name, {})[head] = own
    return told


def _ok(own: Sequence[Cell]) -> list[Run]:
    return [cell.run for cell in own if cell.run is not None and cell.run.is_ok]


def _without_mfu(runs: Sequence[Run]) -> str:
    """Why the column is blank, each reason once."""
    rows = [run_formatting.passport_row(run) for run in runs if run.readout is not None]
    reasons = dict.fromkeys(str(row.reason) for row in rows if row.utilisation is None)
    return f"No MFU: {escaped('; '.join(reasons))}." if reasons else ""


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


def _figures(cell: Cell, certificates: Sequence[Certificate]) -> dict[str, str]:
    """By head; what is not told is left out."""
    run, outcome = cell.run, cell.outcome
    if run is None or not run.is_ok or outcome.status != "ok":
        reason = without_places(outcome.reason or "not told", [])
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]}…"
        if outcome.status == "ok":
            reason = "its record is missing or damaged"
        return {
            "status": outcome.status,
            "by formula": gib(rank_bytes(outcome.config)) if outcome.config else "",
            "remarks": escaped(reason),
            "record": "none" if run is None else run_formatting.record(run),
        }
    return {
        "status": outcome.status,
        "speed": run_formatting.speed(run),
        "FLOPs": run_formatting.flops(run.config),
        "peak memory": _peak(run),
        "by formula": gib(rank_bytes(run.config)),
        "loss parity": parity_cell(run, certificates),
        "remarks": run_formatting.flags(run),
        "record": run_formatting.record(run),
        **_steady(run),
    }


def _steady(run: Run) -> dict[str, str]:
    """What only a run with a steady state can tell."""
    if run.readout is None or run.units_per_s is None:
        return {}
    row, unit, step_s = run_formatting.passport_row(run), f"{run.unit}s", run.readout.step.median
    samples = rate_in_words(
        run.config.global_batch_size / step_s, "samples" if run.unit == "token" else "images"
    )
    return {
        "over all steps": rate_in_words(run.readout.mean_units_per_s, unit),
        "samples": samples,
        "a device": rate_in_words(run.units_per_s / run.config.parallel.world_size, unit),
        "median step": ms(step_s),
        "FLOP/s a device": "" if row.flops_per_s is None else f"{si(row.flops_per_s)}FLOP/s",
        "MFU": "" if row.utilisation is None else f"{row.utilisation:.1%}",
        "of the ceiling": "" if row.share_of_ceiling is None else f"{row.share_of_ceiling:.1%}",
    }


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
    title = f"Commands of the {count(len(own), 'cell')} of {run_formatting.TITLES[recipe]}"
    block = code_block("\n".join(lines), "sh")
    return f"<details>\n<summary>{title}</summary>\n\n{block}\n\n</details>"


def _plain(cell: Cell, axes: Sequence[str]) -> list[str]:
    told = {**cell.outcome.options, "repeat": str(cell.outcome.repeat)}
    return [told.get(axis, "by default") for axis in axes]
