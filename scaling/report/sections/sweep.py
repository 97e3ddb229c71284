"""The page of a sweep: its configurations with their launches pooled, every launch, what failed.

A configuration has one number in all tables of the page.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from scaling.analysis.efficiency import MeasuredPoint, Scaling, pool
from scaling.analysis.proof import find_proof
from scaling.markdown import escaped, folded_commands, shortened
from scaling.parity.certificate import Certificate
from scaling.report import run_formatting
from scaling.report.environment import without_paths
from scaling.report.plots import not_drawn
from scaling.report.run_formatting import LONGEST_REMARK
from scaling.report.sections.max_batch import limit_blocks
from scaling.report.sections.parity import describe_proof
from scaling.report.sweeps import SweepOfRecipe, successful_run
from scaling.report.table_notes import conditions_of_rows, draw
from scaling.store.conditions import without_threads
from scaling.store.reader import Cell
from scaling.store.run import Run
from unitransformer.costs.memory import rank_bytes
from unitransformer.record.units import (
    format_bytes,
    format_count,
    format_ms,
    format_rate,
    format_si,
)

LONGEST_SHARED = 80  # characters of an option that all cells share
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
AFTER_AXES = (  # headings of the table of configurations, behind those of the axes
    "status",
    "speed",
    "launches",
    "median step",
    "FLOPs",
    "MFU",
    "share of ceiling",
    "peak memory",
    "memory by formula",
    *(f"{scaling} efficiency" for scaling in get_args(Scaling)),
    "loss parity",
    "remarks",
)
OF_A_LAUNCH = (
    "status",
    "speed",
    "mean speed",
    "samples",
    "per device",
    "median step",
    "FLOPs",
    "FLOP/s per device",
    "MFU",
    "share of ceiling",
    "peak memory",
    "remarks",
    "record",
)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The launches of one configuration."""

    number: int  # from 1
    cells: Sequence[Cell]
    runs: Sequence[Run]  # of the cells that ended well
    points: Sequence[MeasuredPoint]  # one for each kind of machine; none without a steady launch


def sweep_blocks(
    sweep: SweepOfRecipe, certificates: Sequence[Certificate], plots: Sequence[str]
) -> list[str]:
    """Returns the blocks on the cells that one recipe has in one sweep.

    Args:
        plots: Markdown images.
    """
    configurations = _configurations(sweep)
    efficiencies = _efficiencies(sweep)
    rows = [
        {"#": str(configuration.number)}
        | {axis: _option(configuration.cells[0], axis) for axis in sweep.axes}
        | dict.fromkeys(AFTER_AXES, "")
        | _pooled(configuration, certificates)
        | _joined(efficiencies.get(point.runs[0].name, {}) for point in configuration.points)
        for configuration in configurations
    ]
    launches = [
        {"#": str(configuration.number), "launch": str(cell.outcome.repeat)} | _launch(cell)
        for configuration in configurations
        for cell in configuration.cells
    ]
    commands = dict.fromkeys(
        (str(own.number), cell.outcome.command) for own in configurations for cell in own.cells
    )
    cells = format_count(len(sweep.cells), "launch", "launches")
    number = format_count(len(configurations), "configuration")
    return [
        f"{number}, {cells}: {_statuses(sweep.cells)}.",
        _shared(sweep),
        *conditions_of_rows([without_threads(run.record) for run in sweep.runs]),
        "### Configurations",
        CONFIGURATIONS,
        SAME_CORES if any(curve.threads for curve in sweep.curves) else "",
        *draw(rows, always=("#", "speed")),
        _why_no_mfu(sweep.runs),
        *limit_blocks(sweep),
        *(["### Plots", *plots, not_drawn(sweep)] if plots else []),
        "### Launches",
        LAUNCHES,
        *draw(launches, always=("#", "speed")),
        folded_commands(f"Commands of the {number}", commands),
    ]


def _configurations(sweep: SweepOfRecipe) -> list[Configuration]:
    groups: dict[str, list[Cell]] = {}
    for cell in sweep.cells:
        groups.setdefault(cell.outcome.cell, []).append(cell)
    configurations = []
    for number, cells in enumerate(groups.values(), 1):
        runs = [run for cell in cells if (run := successful_run(cell)) is not None]
        points = pool([run for run in runs if run.metrics is not None], sweep.scatters)
        configurations.append(Configuration(number=number, cells=cells, runs=runs, points=points))
    return configurations


def _shared(sweep: SweepOfRecipe) -> str:
    """Returns a sentence on the model and the options that all cells share."""
    shapes = sorted({run_formatting.shape(run.config.model) for run in sweep.runs})
    model = [f"a model of {shapes[0]}"] if len(shapes) == 1 else []
    options = [
        f"{name} {value}"
        for name, value in sweep.cells[0].outcome.options.items()
        if name not in sweep.axes and len(str(value)) <= LONGEST_SHARED
    ]
    text = ", ".join([*model, *options])
    return f"All cells: {escaped(without_paths(text, []))}." if text else ""


def _option(cell: Cell, axis: str) -> str:
    return escaped(str(cell.outcome.options.get(axis, "default")))


def _statuses(cells: Sequence[Cell]) -> str:
    statuses = [cell.outcome.status for cell in cells]
    ordered = sorted(set(statuses), key=lambda status: (status != "ok", status))
    return ", ".join(f"{statuses.count(status)} {status}" for status in ordered)


def _why_no_mfu(runs: Sequence[Run]) -> str:
    rows = [run_formatting.mfu_row(run) for run in runs if run.metrics is not None]
    reasons = dict.fromkeys(str(row.reason) for row in rows if row.utilisation is None)
    return f"No MFU: {escaped('; '.join(reasons))}." if reasons else ""


# ---------------------------------------------------------------------------- configurations


def _pooled(configuration: Configuration, certificates: Sequence[Certificate]) -> dict[str, str]:
    """Cells by heading; what is not known is left out."""
    cells, runs = configuration.cells, configuration.runs
    statuses = {cell.outcome.status for cell in cells}
    row = {"status": statuses.pop() if len(statuses) == 1 else _statuses(cells)}
    remarks = [_reason(cell) for cell in cells if successful_run(cell) is None]
    config = next((cell.outcome.config for cell in cells if cell.outcome.config), None)
    if runs:
        config, proof = runs[0].config, find_proof(runs[0], certificates)
        remarks += [flag for run in runs for flag in run.record["flags"]]
        remarks += [run_formatting.no_steady_state(run) for run in runs if run.metrics is None]
        row |= {
            "FLOPs": run_formatting.flops(config),
            "peak memory": run_formatting.peak(runs),
            "loss parity": "not proven" if proof is None else describe_proof(proof),
        }
    if config is not None:
        row["memory by formula"] = format_bytes(rank_bytes(config))
    row["remarks"] = shortened("; ".join(dict.fromkeys(map(escaped, remarks))), LONGEST_REMARK)
    return row | _joined(map(_steady_point, configuration.points))


def _steady_point(point: MeasuredPoint) -> dict[str, str]:
    mfu, share = run_formatting.pooled_shares(point)
    return {
        "speed": run_formatting.pooled_speed(point),
        "launches": run_formatting.launches(point),
        "median step": format_ms(point.runs[0].units_per_step / point.rate.value),
        "MFU": mfu,
        "share of ceiling": share,
    }


def _efficiencies(sweep: SweepOfRecipe) -> dict[str, dict[str, str]]:
    """Cells by heading, by the name of the run."""
    cells: dict[str, dict[str, str]] = {}
    for curve in sweep.curves:
        for point in curve.points:
            text = "baseline"
            if point is not curve.baseline:
                text = run_formatting.estimate(curve.efficiency(point), "{:.1%}")
            for run in point.runs:
                cells.setdefault(run.name, {})[f"{curve.scaling} efficiency"] = text
    return cells


def _joined(points: Iterable[dict[str, str]]) -> dict[str, str]:
    """Joins the cells of the points of one configuration."""
    joined: dict[str, list[str]] = {}
    for point in points:
        for heading, cell in point.items():
            joined.setdefault(heading, []).append(cell)
    return {heading: "; ".join(cells) for heading, cells in joined.items()}


# ---------------------------------------------------------------------------- launches


def _launch(cell: Cell) -> dict[str, str]:
    row = dict.fromkeys(OF_A_LAUNCH, "") | {"status": str(cell.outcome.status)}
    run = successful_run(cell)
    if run is None:
        record = "none" if cell.run is None else run_formatting.record(cell.run)
        return row | {"remarks": escaped(_reason(cell)), "record": record}
    row |= {
        "speed": run_formatting.speed(run),
        "FLOPs": run_formatting.flops(run.config),
        "peak memory": run_formatting.peak([run]),
        "remarks": run_formatting.flags([run]),
        "record": run_formatting.record(run),
    }
    if run.metrics is None:
        return row
    mfu, unit, step_s = run_formatting.mfu_row(run), f"{run.unit}s", run.metrics.step.median
    samples = "samples" if run.unit == "token" else "images"
    per_device = run.metrics.units_per_s / run.config.parallel.world_size
    return row | {
        "mean speed": format_rate(run.metrics.mean_units_per_s, unit),
        "samples": format_rate(run.config.global_batch_size / step_s, samples),
        "per device": format_rate(per_device, unit),
        "median step": format_ms(step_s),
        "FLOP/s per device": ""
        if mfu.flops_per_s is None
        else f"{format_si(mfu.flops_per_s)}FLOP/s",
        "MFU": "" if mfu.utilisation is None else f"{mfu.utilisation:.1%}",
        "share of ceiling": "" if mfu.share_of_ceiling is None else f"{mfu.share_of_ceiling:.1%}",
    }


def _reason(cell: Cell) -> str:
    if cell.outcome.status == "ok":
        return "its record is missing or damaged"
    reason = without_paths(cell.outcome.reason or "no reason recorded", [])
    return shortened(reason, LONGEST_REMARK)
