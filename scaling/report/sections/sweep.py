"""The page of a sweep: its configurations with their launches pooled, every launch, what failed.

A configuration has one number in all tables of the page.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from scaling.analysis.efficiency import Scaling, pool
from scaling.analysis.proof import find_proof
from scaling.markdown import escaped, folded_commands, shortened
from scaling.parity.certificate import Certificate
from scaling.report import run_formatting
from scaling.report.run_formatting import LONGEST_REMARK, without_paths
from scaling.report.sections.parity import describe_proof
from scaling.report.store_analysis import SweepOfRecipe
from scaling.report.table_notes import conditions_of_rows, draw
from scaling.store.conditions import without_threads
from scaling.store.outcome import AXIS, OUT_OF_MEMORY
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
LARGEST_BATCH = (
    "**Largest batch per device** that ran, and the smallest that did not fit, for configurations "
    "that ran out of memory; sizes between the two were not tried."
)
SAME_CORES = (
    "More devices are no more hardware here: the ranks share the cores of one machine, so that on "
    "n devices an efficiency of 1/n loses nothing."
)

EFFICIENCIES = [f"{scaling} efficiency" for scaling in get_args(Scaling)]


def sweep_blocks(
    sweep: SweepOfRecipe, certificates: Sequence[Certificate], plots: Sequence[str]
) -> list[str]:
    """Returns the blocks on the cells that one recipe has in one sweep.

    Args:
        plots: Markdown images.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in sweep.cells:
        groups.setdefault(cell.outcome.cell, []).append(cell)
    efficiencies = _efficiencies(sweep)
    rows, launches, commands = [], [], dict[tuple[str, str], None]()
    for number, cells in enumerate(groups.values(), 1):
        row = {"#": str(number)} | {axis: _option(cells[0], axis) for axis in sweep.axes}
        rows.append(row | _pooled(cells, sweep, certificates, efficiencies))
        for cell in cells:
            launch = {"#": str(number), "launch": str(cell.outcome.repeat)}
            launches.append(launch | _launch(cell))
            commands[str(number), cell.outcome.command] = None
    configurations = format_count(len(groups), "configuration")
    num_launches = format_count(len(sweep.cells), "launch", "launches")
    return [
        f"{configurations}, {num_launches}: {_statuses(sweep.cells)}.",
        _shared(sweep),
        *conditions_of_rows([without_threads(run.record) for run in sweep.runs]),
        "### Configurations",
        CONFIGURATIONS,
        SAME_CORES if any(curve.threads for curve in sweep.curves) else "",
        *draw(rows, always=("#", "speed")),
        run_formatting.explain_flags(rows),
        _why_no_mfu(sweep.runs),
        *_limits(sweep),
        *(["### Plots", *plots, not_drawn(sweep)] if plots else []),
        "### Launches",
        LAUNCHES,
        *draw(launches, always=("#", "speed")),
        folded_commands(f"Commands of the {configurations}", commands),
    ]


def not_drawn(sweep: SweepOfRecipe) -> str:
    """Returns a sentence on the cells that no plot can show, if there are any."""
    missing: Counter[str] = Counter()
    for cell in sweep.cells:
        run, status = cell.successful_run, cell.outcome.status
        if run is None:
            missing["without its record" if status == "ok" else status] += 1
        elif run.metrics is None:
            missing["without a steady state"] += 1
    if not missing:
        return ""
    counts = ", ".join(f"{number} {what}" for what, number in sorted(missing.items()))
    cells = format_count(len(sweep.cells), "cell")
    return f"Not in the plots, of {cells}: {counts}; the table gives reasons."


def _shared(sweep: SweepOfRecipe) -> str:
    shapes = {run_formatting.shape(run.config.model) for run in sweep.runs}
    parts = [f"a model of {shape}" for shape in shapes if len(shapes) == 1]
    parts += [
        f"{name} {value}"
        for name, value in sweep.cells[0].outcome.options.items()
        if name not in sweep.axes and len(str(value)) <= LONGEST_SHARED
    ]
    text = ", ".join(parts)
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


def _pooled(
    cells: Sequence[Cell],
    sweep: SweepOfRecipe,
    certificates: Sequence[Certificate],
    efficiencies: Mapping[str, Mapping[str, str]],
) -> dict[str, str]:
    """Returns the row of a configuration; kinds of machines share its cells."""
    runs = [run for cell in cells if (run := cell.successful_run) is not None]
    points = pool([run for run in runs if run.metrics is not None], sweep.scatters)
    statuses = {cell.outcome.status for cell in cells}
    config = next((cell.outcome.config for cell in cells if cell.outcome.config), None)
    proof = find_proof(runs[0], certificates) if runs else None
    remarks = [escaped(_reason(cell)) for cell in cells if cell.successful_run is None]
    remarks += run_formatting.short_flags(runs)
    remarks += [run_formatting.no_steady_state(run) for run in runs if run.metrics is None]
    shares = [run_formatting.pooled_shares(point) for point in points]
    of_points = [efficiencies.get(point.runs[0].name, {}) for point in points]
    step_s = [point.runs[0].units_per_step / point.rate.value for point in points]
    return {
        "status": statuses.pop() if len(statuses) == 1 else _statuses(cells),
        "speed": _joined(map(run_formatting.pooled_speed, points)),
        "launches": _joined(map(run_formatting.launches, points)),
        "median step": _joined(map(format_ms, step_s)),
        "FLOPs": run_formatting.flops(runs[0].config) if runs else "",
        "MFU": _joined(mfu for mfu, _ in shares),
        "share of ceiling": _joined(share for _, share in shares),
        "peak memory": run_formatting.peak(runs) if runs else "",
        "memory by formula": "" if config is None else format_bytes(rank_bytes(config)),
        **{name: _joined(cells.get(name, "") for cells in of_points) for name in EFFICIENCIES},
        "loss parity": describe_proof(proof) if proof else "not proven" if runs else "",
        "remarks": shortened("; ".join(dict.fromkeys(remarks)), LONGEST_REMARK),
    }


def _joined(of_points: Iterable[str]) -> str:
    return "; ".join(filter(None, of_points))


def _efficiencies(sweep: SweepOfRecipe) -> dict[str, dict[str, str]]:
    """Cells by heading, by the name of the run."""
    cells: dict[str, dict[str, str]] = {}
    for curve in sweep.curves:
        for point in curve.points:
            text = run_formatting.estimate(curve.efficiency(point), "{:.1%}")
            text = "baseline" if point is curve.baseline else text
            for run in point.runs:
                cells.setdefault(run.name, {})[f"{curve.scaling} efficiency"] = text
    return cells


def _launch(cell: Cell) -> dict[str, str]:
    run = cell.successful_run
    if run is None:
        record = "none" if cell.run is None else run_formatting.record(cell.run)
        cells = {"status": str(cell.outcome.status), "remarks": escaped(_reason(cell))}
        return cells | {"record": record}
    mfu, metrics, unit = run_formatting.mfu_row(run), run.metrics, f"{run.unit}s"
    flops = "" if mfu.flops_per_s is None else f"{format_si(mfu.flops_per_s)}FLOP/s"
    steady = dict.fromkeys(("mean speed", "samples", "per device", "median step"), "")
    if metrics is not None:
        samples_per_s = run.config.global_batch_size / metrics.step.median
        per_device = metrics.units_per_s / run.config.parallel.world_size
        steady = {
            "mean speed": format_rate(metrics.mean_units_per_s, unit),
            "samples": format_rate(samples_per_s, "samples" if unit == "tokens" else "images"),
            "per device": format_rate(per_device, unit),
            "median step": format_ms(metrics.step.median),
        }
    return {
        "status": str(cell.outcome.status),
        "speed": run_formatting.speed(run),
        **steady,
        "FLOPs": run_formatting.flops(run.config),
        "FLOP/s per device": flops,
        "MFU": "" if mfu.utilisation is None else f"{mfu.utilisation:.1%}",
        "share of ceiling": "" if mfu.share_of_ceiling is None else f"{mfu.share_of_ceiling:.1%}",
        "peak memory": run_formatting.peak([run]),
        "remarks": run_formatting.flag_cell([run]),
        "record": run_formatting.record(run),
    }


def _reason(cell: Cell) -> str:
    if cell.outcome.status == "ok":
        return "its record is missing or damaged"
    reason = without_paths(cell.outcome.reason or "no reason recorded", [])
    return shortened(reason, LONGEST_REMARK)


def _limits(sweep: SweepOfRecipe) -> list[str]:
    groups: dict[tuple[str, ...], list[tuple[int, Cell]]] = {}
    axes = [axis for axis in sweep.axes if axis != AXIS]
    for cell in sweep.cells:
        size = str(cell.outcome.options.get(AXIS, ""))
        if size.isdecimal():
            place = tuple(_option(cell, axis) for axis in axes)
            groups.setdefault(place, []).append((int(size), cell))
    rows = []
    for place, cells in groups.items():
        too_large = [size for size, cell in cells if cell.outcome.status in OUT_OF_MEMORY]
        if not too_large:
            continue
        least, fits = min(too_large), "none of those tried"
        if runs := {size: run for size, cell in cells if (run := cell.successful_run) is not None}:
            fits = f"{max(runs):,}, {run_formatting.record(runs[max(runs)])}"
        statuses = dict.fromkeys(cell.outcome.status for size, cell in cells if size == least)
        failure = {"fits": fits, "does not fit": f"{least:,}, {' and '.join(statuses)}"}
        rows.append(dict(zip(axes, place, strict=True)) | failure)
    return [LARGEST_BATCH, *draw(rows, always=("fits", "does not fit"))] if rows else []
