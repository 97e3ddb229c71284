"""The page of a sweep: its configurations with their launches pooled, every launch, what failed.

A configuration has one number, which the tables of the page share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import get_args

from scaling.analysis.efficiency import (
    Curve,
    ModelOnMachine,
    MeasuredPoint,
    Scaling,
    Scatter,
    find_curves,
    pool,
)
from scaling.analysis.proof import find_proof
from scaling.markdown import code_block, command_lines, details, escaped, shortened
from scaling.parity.certificate import Certificate
from scaling.report import run_formatting
from scaling.report.environment import apart, without_places
from scaling.report.plots import not_drawn
from scaling.report.run_formatting import LONGEST_REMARK
from scaling.report.sections.answer import launches
from scaling.report.sections.max_batch import limit_blocks
from scaling.report.sections.parity import describe_proof
from scaling.report.table_notes import Columns, draw, figure, shape_in_words, speed
from scaling.store.conditions import without_threads
from scaling.store.reader import Cell
from scaling.store.run import Run
from unitransformer.costs.memory import rank_bytes
from unitransformer.record.units import count, gib, ms, rate_in_words, si

LONGEST_SHARED = 80  # letters of an option that all cells share
CONFIGURATIONS = (
    "One row per configuration, its launches pooled. "
    "Speed is that of all devices together at the median steady step, with its 95 % interval; "
    "launches are their number and the range of their speeds. "
    "MFU and the share of the ceiling follow the `matmul` convention and are medians of the "
    "launches; peak memory is the largest of all ranks and launches. "
    "Memory by formula is what weights, optimizer states and activations need. "
    "Efficiency is speed per device over that on the fewest devices: strong at the same global "
    "batch, weak at the same batch per device."
)
LAUNCHES = (
    "Every launch. The interval of its speed comes from its steps alone and says nothing about "
    "another launch. The mean speed counts stalls too. The record holds the raw samples."
)
SAME_CORES = (
    "More devices are no more hardware here: the ranks share the cores of one machine, so that on "
    "n devices an efficiency of 1/n loses nothing."
)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The launches of one configuration."""

    number: int  # from 1
    cells: tuple[Cell, ...]
    points: tuple[MeasuredPoint, ...]  # one for each kind of machine; none without a steady launch

    @property
    def runs(self) -> list[Run]:
        return _ok(self.cells)


def sweep_blocks(
    swept: Sequence[Cell],
    certificates: Sequence[Certificate],
    plots: Sequence[tuple[str, str]],
    scatters: Mapping[ModelOnMachine, Scatter],
) -> list[str]:
    """Blocks on the cells that one recipe has in one sweep.

    Args:
        plots: what each shows, and its link.
    """
    ordered = in_order(swept)
    axes = [axis for axis in varied(ordered) if axis != "repeat"]
    configurations = _configurations(ordered, scatters)
    curves = find_curves(_ok(ordered), scatters)
    return [
        f"{count(len(configurations), 'configuration')}, "
        f"{count(len(swept), 'launch', 'launches')}: {_statuses(swept)}.",
        _shared(ordered, axes),
        apart([without_threads(run.record) for run in _ok(swept)]),
        "### Configurations",
        CONFIGURATIONS,
        SAME_CORES if any(curve.threads for curve in curves) else "",
        *draw(_columns(configurations, axes, certificates, curves), aside=("#", "speed")),
        _without_mfu(_ok(swept)),
        *limit_blocks(ordered, axes),
        *(["### Plots"] if plots else []),
        *(f"![{title}]({link_})" for title, link_ in plots),
        not_drawn(swept) if plots else "",
        "### Launches",
        LAUNCHES,
        *draw(_launches(configurations), aside=("#", "speed")),
        _commands(configurations),
    ]


def _configurations(
    ordered: Sequence[Cell], scatters: Mapping[ModelOnMachine, Scatter]
) -> list[Configuration]:
    """In the order of the cells."""
    grouped: dict[str, list[Cell]] = {}
    for cell in ordered:
        grouped.setdefault(cell.outcome.cell, []).append(cell)
    return [
        Configuration(
            number=number,
            cells=tuple(own),
            points=tuple(pool([run for run in _ok(own) if run.metrics is not None], scatters)),
        )
        for number, own in enumerate(grouped.values(), 1)
    ]


def _shared(ordered: Sequence[Cell], axes: Sequence[str]) -> str:
    """What all cells have in common: the model, and the options that were given."""
    told = sorted({shape_in_words(run.config.model) for run in _ok(ordered)})
    model = [f"a model of {told[0]}"] if len(told) == 1 else []
    options = ordered[0].outcome.options
    given = [
        f"{name} {value}"
        for name, value in options.items()
        if name not in axes and len(str(value)) <= LONGEST_SHARED
    ]
    words = ", ".join([*model, *given])
    return f"All cells: {escaped(without_places(words, []))}." if words else ""


# ---------------------------------------------------------------------------- configurations


def _columns(
    configurations: Sequence[Configuration],
    axes: Sequence[str],
    certificates: Sequence[Certificate],
    curves: Sequence[Curve],
) -> Columns:
    """A row for each configuration; columns that are empty in all rows are left out."""
    efficient = _efficiencies(curves)
    rows = [
        {axis: _option(own.cells[0], axis) for axis in axes}
        | _pooled(own, certificates)
        | _joined([efficient.get(point.runs[0].name, {}) for point in own.points])
        for own in configurations
    ]
    return {
        "#": [str(own.number) for own in configurations],
        **_filled(
            rows,
            (
                *(*axes, "status", "speed", "launches", "median step", "FLOPs"),
                *("MFU", "share of ceiling", "peak memory", "memory by formula"),
                *(f"{scaling} efficiency" for scaling in get_args(Scaling)),
                *("loss parity", "remarks"),
            ),
        ),
    }


def _filled(rows: Sequence[Mapping[str, str]], heads: Sequence[str]) -> Columns:
    return {
        head: [row.get(head, "") for row in rows]
        for head in heads
        if any(row.get(head, "") not in ("", "none") for row in rows)
    }


def _joined(of_points: Sequence[Mapping[str, str]]) -> dict[str, str]:
    heads = dict.fromkeys(head for told in of_points for head in told)
    return {head: "; ".join(t[head] for t in of_points if head in t) for head in heads}


def _option(cell: Cell, axis: str) -> str:
    return escaped(str(cell.outcome.options.get(axis, "default")))


def _pooled(own: Configuration, certificates: Sequence[Certificate]) -> dict[str, str]:
    """Cells by head; what is not known is left out."""
    statuses = [cell.outcome.status for cell in own.cells]
    told = {"status": statuses[0] if len(set(statuses)) == 1 else _statuses(own.cells)}
    remarks = [_reason(cell) for cell in own.cells if cell not in _succeeded(own.cells)]
    config = next((cell.outcome.config for cell in own.cells if cell.outcome.config), None)
    if own.runs:
        run = own.runs[0]
        config, proof = run.config, find_proof(run, certificates)
        remarks += [flag for run in own.runs for flag in run.record["flags"]]
        remarks += [run_formatting.too_short(run) for run in own.runs if run.metrics is None]
        told |= {
            "FLOPs": run_formatting.flops(config),
            "peak memory": run_formatting.peak(own.runs),
            "loss parity": "not proven" if proof is None else describe_proof(proof),
        }
    if config is not None:
        told["memory by formula"] = gib(rank_bytes(config))
    told["remarks"] = shortened("; ".join(dict.fromkeys(map(escaped, remarks))), LONGEST_REMARK)
    return told | _joined([_steady_point(point) for point in own.points])


def _steady_point(point: MeasuredPoint) -> dict[str, str]:
    rows = [run_formatting.passport_row(run) for run in point.runs]
    mfu = [row.utilisation for row in rows if row.utilisation is not None]
    shares = [row.share_of_ceiling for row in rows if row.share_of_ceiling is not None]
    run = point.runs[0]
    return {
        "speed": speed(point),
        "launches": launches(point),
        "median step": ms(run.units_per_step / point.rate.value),
        "MFU": f"{median(mfu):.1%}" if mfu else "",
        "share of ceiling": f"{median(shares):.1%}" if shares else "",
    }


def _efficiencies(curves: Sequence[Curve]) -> dict[str, dict[str, str]]:
    """Cells by head, by the name of the run."""
    told: dict[str, dict[str, str]] = {}
    for curve in curves:
        for point in curve.points:
            is_first = point is curve.baseline
            own = "baseline" if is_first else figure(curve.efficiency(point), "{:.1%}")
            for run in point.runs:
                told.setdefault(run.name, {})[f"{curve.scaling} efficiency"] = own
    return told


def _succeeded(own: Sequence[Cell]) -> list[Cell]:
    return [
        cell
        for cell in own
        if cell.outcome.status == "ok" and cell.run is not None and cell.run.is_ok
    ]


def _ok(own: Sequence[Cell]) -> list[Run]:
    return [cell.run for cell in _succeeded(own) if cell.run is not None]


def _without_mfu(runs: Sequence[Run]) -> str:
    """Why the column is missing, each reason once."""
    rows = [run_formatting.passport_row(run) for run in runs if run.metrics is not None]
    reasons = dict.fromkeys(str(row.reason) for row in rows if row.utilisation is None)
    return f"No MFU: {escaped('; '.join(reasons))}." if reasons else ""


def varied(own: Sequence[Cell]) -> list[str]:
    """Options in which cells differ, in the order in which they were given; then the repeat."""
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


# ---------------------------------------------------------------------------- launches


def _launches(configurations: Sequence[Configuration]) -> Columns:
    rows = [
        {"#": str(own.number), "launch": str(cell.outcome.repeat), **_launch(cell)}
        for own in configurations
        for cell in own.cells
    ]
    return _filled(
        rows,
        (
            *("#", "launch", "status", "speed", "mean speed", "samples", "per device"),
            *("median step", "FLOPs", "FLOP/s per device", "MFU", "share of ceiling"),
            *("peak memory", "remarks", "record"),
        ),
    )


def _reason(cell: Cell) -> str:
    if cell.outcome.status == "ok":
        return "its record is missing or damaged"
    return shortened(
        without_places(cell.outcome.reason or "no reason recorded", []), LONGEST_REMARK
    )


def _launch(cell: Cell) -> dict[str, str]:
    """Cells by head; what is not known is left out."""
    run, outcome = cell.run, cell.outcome
    if run is None or cell not in _succeeded([cell]):
        return {
            "status": outcome.status,
            "remarks": escaped(_reason(cell)),
            "record": "none" if run is None else run_formatting.record(run),
        }
    return {
        "status": outcome.status,
        "speed": run_formatting.speed(run),
        "FLOPs": run_formatting.flops(run.config),
        "peak memory": run_formatting.peak([run]),
        "remarks": run_formatting.flags(run),
        "record": run_formatting.record(run),
        **_steady(run),
    }


def _steady(run: Run) -> dict[str, str]:
    """What only a run with a steady state can tell."""
    if run.metrics is None or run.units_per_s is None:
        return {}
    row, unit, step_s = run_formatting.passport_row(run), f"{run.unit}s", run.metrics.step.median
    samples = rate_in_words(
        run.config.global_batch_size / step_s, "samples" if run.unit == "token" else "images"
    )
    return {
        "mean speed": rate_in_words(run.metrics.mean_units_per_s, unit),
        "samples": samples,
        "per device": rate_in_words(run.units_per_s / run.config.parallel.world_size, unit),
        "median step": ms(step_s),
        "FLOP/s per device": "" if row.flops_per_s is None else f"{si(row.flops_per_s)}FLOP/s",
        "MFU": "" if row.utilisation is None else f"{row.utilisation:.1%}",
        "share of ceiling": "" if row.share_of_ceiling is None else f"{row.share_of_ceiling:.1%}",
    }


def _commands(configurations: Sequence[Configuration]) -> str:
    """Folded: launches of one configuration have the same command."""
    lines = [
        f"# {own.number}\n{command_lines(command)}"
        for own in configurations
        for command in dict.fromkeys(cell.outcome.command for cell in own.cells)
    ]
    title = f"Commands of the {count(len(configurations), 'configuration')}"
    return details(title, code_block("\n".join(lines), "sh"))
