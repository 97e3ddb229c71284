"""Shows speed-up and efficiency over device counts, where time was lost, and fitted scaling laws.

A table has a row for each device count of a curve but its baseline.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from scaling.analysis.efficiency import VARYING_ON_A_CURVE, Curve, MeasuredPoint, Scaling
from scaling.analysis.scaling_laws import LawFit, LawName, fit_laws
from scaling.analysis.time_lost import LossPart, TimeLost, explain
from scaling.markdown import escaped, table
from scaling.report import run_formatting, table_notes
from scaling.report.plots import batch_of
from scaling.store.conditions import differences, without_threads
from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.record.units import format_count

EFFICIENCY = (
    "Speed-up is speed over that of the baseline, the fewest devices of the curve. "
    "Efficiency is the speed-up over the ideal one: twice the speed on twice the devices. "
    "Intervals are of 95 %. "
    "The lost share, 1 less the efficiency, is divided among the parts of a step; what is below 0 "
    "was gained. "
    "Machine drift is the highest compute ceiling that the jobs of a row and of its baseline "
    "measured, over the lowest, less 1. "
    "The slowest rank is the one that was the slowest most often; by chance a rank is that in 1/n "
    "of the steps."
)
SAME_CORES = (
    "More devices are no more hardware here: the ranks share the cores, so each has fewer threads. "
    "An efficiency of 1/n on n times the devices loses nothing; what is below it is lost."
)
BATCHES: dict[Scaling, str] = {"strong": "global batch", "weak": "batch per device"}
PROCESSORS = "processors and devices differ"  # as `conditions.differences` begins that line
LAWS: dict[LawName, str] = {"Amdahl": "Amdahl's law", "USL": "Universal scalability law"}
PARAMETERS = {"s": "serial share s", "a": "contention a", "b": "coherency b"}


@dataclass(frozen=True, kw_only=True)
class CurveRow:
    """A point that is not the baseline."""

    number: int  # from 1, through all tables
    curve: Curve
    point: MeasuredPoint
    lost: TimeLost
    laws: tuple[LawFit, LawFit]


def scaling_blocks(curves: Sequence[Curve]) -> list[str]:
    """Returns tables of strong and weak scaling and of laws, with notes; nothing without curves."""
    rows: list[CurveRow] = []
    tables: dict[tuple[Scaling, bool], list[CurveRow]] = {}
    for curve in sorted(curves, key=_reading_order):
        laws = fit_laws(curve)
        for point in curve.points[1:]:
            lost, number = explain(curve.baseline.middle, point.middle), len(rows) + 1
            rows.append(CurveRow(number=number, curve=curve, point=point, lost=lost, laws=laws))
            tables.setdefault((curve.scaling, curve.threads is not None), []).append(rows[-1])
    if not rows:
        return []
    blocks, fitted = [EFFICIENCY], list[Sequence[str]]()
    for (scaling, is_split), same in tables.items():
        configs = [row.curve.baseline.config for row in same]
        places = {
            **table_notes.differing(configs, VARYING_ON_A_CURVE),
            "strategy": [row.curve.strategy for row in same],
            BATCHES[scaling]: [
                f"{math.prod(batch_of(row.curve)):,}{_micro_batches(row.point.config)}"
                for row in same
            ],
        }
        about = [f"**{scaling.title()} scaling{' on the same cores' if is_split else ''}.**"]
        about += [SAME_CORES] if is_split else []
        about += [table_notes.shared(configs, VARYING_ON_A_CURVE)]
        measured = [p for p in get_args(LossPart) if any(p in row.lost.parts for row in same)]
        cells = [
            {"row": str(row.number), **{head: values[i] for head, values in places.items()}}
            | _cells(row, measured)
            for i, row in enumerate(same)
        ]
        blocks.append(" ".join(filter(None, about)))
        blocks += table_notes.draw(cells, always=("row", "devices"))
        fitted += _laws(same, places)
    if fitted:
        blocks.append(table(("law", "curve", "parameters", "remark"), fitted))
    remarks = [(text, row.number) for row in rows for text in _remarks(row)]
    conditions = [(line, row.number) for row in rows for line in _conditions(row.curve)]
    order = "along a curve, those of the baseline first"
    return [
        *blocks,
        table_notes.notes(remarks, len(rows)),
        run_formatting.explain_flags({"": text} for text, _ in remarks),
        *table_notes.different_conditions(conditions, len(rows), order),
    ]


def _reading_order(curve: Curve) -> tuple[str, bool, int, list[str], str, int]:
    config, settings = curve.baseline.config, table_notes.settings_of(curve.baseline.config)
    fixed = [settings[field] for field in table_notes.SETTINGS if field not in VARYING_ON_A_CURVE]
    batch, size = math.prod(batch_of(curve)), count_parameters(config.model)
    return curve.scaling, curve.threads is not None, size, fixed, curve.strategy, batch


def _micro_batches(config: RunConfig) -> str:
    return f", {config.accumulate} micro-batches" if config.accumulate > 1 else ""


def _cells(row: CurveRow, measured: Sequence[LossPart]) -> dict[str, str]:
    curve, baseline, point, lost = row.curve, row.curve.baseline, row.point, row.lost
    drift, slowest, rank = curve.drift(point), lost.slowest, ""
    launches = f", {len(baseline.runs)} launches" if len(baseline.runs) > 1 else ""
    nodes = baseline.config.parallel.num_nodes
    on_nodes = f" on {nodes} nodes" if nodes > 1 else ""
    devices = f"{format_count(baseline.devices, 'device')}{on_nodes}"
    about = f"{devices}{_micro_batches(baseline.config)}{launches}"
    parts: dict[str, str] = {
        part: f"{lost.parts[part]:z.1%}" if part in lost.parts else "not measured"
        for part in measured
    }
    if slowest is not None:
        rank = f"rank {slowest.rank} in {slowest.share:.0%}"
    return {
        "devices": run_formatting.device_count(point.config),
        "speed": run_formatting.pooled_speed(point),
        "baseline": f"{about}: {run_formatting.pooled_speed(baseline)}",
        "FLOPs": run_formatting.flops(point.config),
        "speed-up": run_formatting.ratio(curve.speedup(point), 2),
        **_efficiency(row),
        **parts,
        "trace": _trace(lost),
        "slowest rank": rank,
        "launches": str(len(point.runs)),
        "machine drift": "" if drift is None else f"{drift:.1%}",
        "record": run_formatting.record(point.middle),
    }


def _efficiency(row: CurveRow) -> dict[str, str]:
    """With the lost share, which is mostly no loss where devices share cores."""
    efficiency = run_formatting.estimate(row.curve.efficiency(row.point), "{:.1%}")
    cells = {"efficiency": efficiency}
    if row.curve.threads is not None:
        ideal = row.curve.ideal(row.point)
        beyond = row.lost.share - (1 - ideal)
        cells |= {"1/n": f"{ideal:.1%}", "lost beyond 1/n": f"{beyond:z.1%}"}
    return cells | {"lost share": f"{row.lost.share:z.1%}"}


def _trace(lost: TimeLost) -> str:
    traced = lost.traced
    if traced is None:
        return ""
    before = "not traced" if traced.baseline_idle is None else f"{traced.baseline_idle:.1%}"
    slowdown = f"traced steps take {traced.slowdown:.2f} x as long"
    return f"{slowdown}, idle {traced.idle:.1%} (baseline {before})"


def _remarks(row: CurveRow) -> Iterable[str]:
    yield from (*row.curve.remarks, *row.lost.caveats)
    yield from (f"flags: {flag}" for flag in run_formatting.short_flags(row.point.runs))
    before = run_formatting.short_flags(row.curve.baseline.runs)
    yield from (f"flags of the baseline: {flag}" for flag in before)
    if network := run_formatting.network(row.point.middle):
        yield f"network: {escaped(network)}"
    unfitted = [law for law in row.laws if law.reason]
    if len(unfitted) == len(row.laws):
        yield f"no law of scaling is fitted: {row.laws[-1].reason}"
    else:
        yield from (f"{LAWS[law.name]} is not fitted: {law.reason}" for law in unfitted)
    both = (row.curve.baseline, row.point)
    if any(len(point.runs) > 1 for point in both):
        yield "the parts of the lost share are those of the middle launch, whose record is linked"
    yield from (f"no interval: {escaped(p.rate.reason)}" for p in both if p.rate.reason)


def _laws(rows: Sequence[CurveRow], places: table_notes.Columns) -> Iterable[tuple[str, ...]]:
    for index, row in enumerate(rows):
        if row.point is not row.curve.points[-1]:
            continue
        numbers = [other.number for other in rows if other.curve is row.curve]
        about = [f"{heading} {cells[index]}" for heading, cells in places.items()]
        curve = f"{', '.join([row.curve.scaling, *about])} ({table_notes.rows_of(numbers, 0)})"
        for law in row.laws:
            if law.reason is None:
                parameters = [
                    f"{PARAMETERS[name]} = {run_formatting.estimate(value, '{:.3g}')}"
                    + (f"; no interval: {escaped(value.reason)}" if value.reason else "")
                    for name, value in law.parameters.items()
                ]
                remarks = [f"within {law.largest_error:.1%} of every point", *law.remarks]
                if row.curve.threads is not None:
                    remarks.append("the same cores: most of it is their split")
                yield LAWS[law.name], curve, ", ".join(parameters), "; ".join(remarks)


def _conditions(curve: Curve) -> list[str]:
    """Returns the conditions that differ; fewer threads where ranks share cores are explained."""
    runs = [run for point in curve.points for run in point.runs]
    lines = list(curve.differing_conditions)
    if curve.threads is not None:
        counts = [
            f"{threads} on {format_count(point.devices, 'device')}"
            for threads, point in zip(curve.threads, curve.points, strict=True)
        ]
        split = f"threads per rank, {', '.join(counts)}, because the ranks share the cores"
        others = differences([without_threads(run.record) for run in runs])
        if not any(line.startswith(PROCESSORS) for line in others):
            lines = [
                f"{PROCESSORS}: {split}" if line.startswith(PROCESSORS) else line for line in lines
            ]
    return table_notes.condition_lines(lines, runs)
