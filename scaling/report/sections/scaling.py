"""Speed-up and efficiency over device counts in the report, and where the time was lost.

A row for each device count of a curve; what several rows share stands once, with their numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from scaling.analysis.efficiency import VARYING_ON_A_CURVE, Curve, MeasuredPoint, Scaling
from scaling.analysis.scaling_laws import LawFit, fit_laws
from scaling.analysis.time_lost import TimeLost, LossPart, Slowest, Traced, explain
from scaling.markdown import escaped, table
from scaling.report import run_formatting
from scaling.report.sections.scaling_laws import TITLES, law_cells, why_not_fitted
from scaling.report.table_notes import (
    SETTINGS,
    Columns,
    Remark,
    differing,
    draw,
    figure,
    flags_of,
    if_told,
    in_words,
    notes,
    numbers_in_words,
    ratio_figure,
    settings_of,
    shared,
    speed,
    unlike,
)
from scaling.store.conditions import differences, without_threads
from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.record.units import count

EFFICIENCY = (
    "Speed-up is speed over that of the baseline, the fewest devices of the curve. "
    "Efficiency is the speed-up over the ideal one: twice the speed on twice the devices. "
    "Intervals are of 95 %. "
    "The lost share, 1 less the efficiency, is divided among the parts of a step; what is below 0 "
    "was gained. "
    "Machine drift is the highest compute ceiling that the jobs of a row and of its baseline "
    "measured, over the lowest, less 1. "
    "The slowest rank is the one that was the slowest most often."
)
SAME_CORES = (
    "More devices are no more hardware here: the ranks share the cores, so each has fewer threads. "
    "An efficiency of 1/n on n times the devices loses nothing; what is below it is lost."
)
KEPT = ("row", "devices")  # columns of a table whatever they hold
BATCHES: dict[Scaling, str] = {"strong": "global batch", "weak": "batch per device"}
PROCESSORS = "processors and devices differ"  # as `joining` begins that line


def scaling_blocks(curves: Sequence[Curve]) -> list[str]:
    """Blocks of Markdown on the curves over device counts of one recipe; none without a curve."""
    rows = _rows_of(curves)
    return [EFFICIENCY, *_curves(rows)] if rows else []


# ---------------------------------------------------------------------------------- curves


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A point that is not the baseline."""

    number: int  # from 1, on through both tables
    curve: Curve
    point: MeasuredPoint
    loss: TimeLost
    laws: tuple[LawFit, LawFit]


def _rows_of(curves: Sequence[Curve]) -> list[_Row]:
    rows: list[_Row] = []
    for curve in sorted(curves, key=_reading_order):
        laws = fit_laws(curve)
        for point in curve.points[1:]:
            loss, number = explain(curve.baseline.middle, point.middle), len(rows) + 1
            rows.append(_Row(number=number, curve=curve, point=point, loss=loss, laws=laws))
    return rows


def _curves(rows: Sequence[_Row]) -> list[str]:
    """A table of strong scaling, one of weak, one of laws, and the notes on all of them."""
    blocks, fitted = [], list[Sequence[str]]()
    for (scaling, is_split), own in _tables(rows).items():
        configs, place = [row.curve.baseline.config for row in own], _place(own)
        heading = f"**{scaling.title()} scaling{' on the same cores' * is_split}.**"
        about = filter(None, [heading, SAME_CORES * is_split, shared(configs, VARYING_ON_A_CURVE)])
        blocks += [
            " ".join(about),
            *draw({"row": [str(row.number) for row in own], **place, **_figures(own)}, KEPT),
        ]
        fitted += _laws(own, place)
    if fitted:
        blocks.append(table(("law", "curve", "parameters", "remark"), fitted))
    apart = [(line, row.number) for row in rows for line in _apart(row.curve)]
    return [
        *blocks,
        "\n".join(notes(_remarks(rows), len(rows))),
        *unlike(apart, len(rows), "along a curve, those of the baseline first"),
    ]


def _tables(rows: Sequence[_Row]) -> dict[tuple[Scaling, bool], list[_Row]]:
    """Rows by kind of scaling, those whose devices share their cores apart."""
    tables: dict[tuple[Scaling, bool], list[_Row]] = {}
    for row in rows:
        tables.setdefault((row.curve.scaling, row.curve.threads is not None), []).append(row)
    return tables


def _place(rows: Sequence[_Row]) -> Columns:
    """What tells one curve of a table from another."""
    return {
        **differing([row.curve.baseline.config for row in rows], VARYING_ON_A_CURVE),
        "strategy": [row.curve.strategy for row in rows],
        BATCHES[rows[0].curve.scaling]: [_batch(row) for row in rows],
    }


def _reading_order(curve: Curve) -> tuple[str, bool, int, list[str], str, int]:
    config = curve.baseline.config
    told = settings_of(config)
    settings = [told[field] for field in SETTINGS if field not in VARYING_ON_A_CURVE]
    batch, size = _batch_size(config, curve.scaling), count_parameters(config.model)
    return curve.scaling, curve.threads is not None, size, settings, curve.strategy, batch


def _batch_size(config: RunConfig, scaling: Scaling) -> int:
    """Of all devices on a strong curve, of one on a weak one."""
    if scaling == "strong":
        return config.global_batch_size
    return config.batch_size * config.accumulate


def _batch(row: _Row) -> str:
    config = row.point.config
    return f"{_batch_size(config, row.curve.scaling):,}{_micro_batches(config)}"


def _micro_batches(config: RunConfig) -> str:
    return f", {config.accumulate} micro-batches" if config.accumulate > 1 else ""


def _figures(rows: Sequence[_Row]) -> Columns:
    losses = [row.loss for row in rows]
    told = [part for part in get_args(LossPart) if any(part in loss.parts for loss in losses)]
    return {
        "devices": [str(row.point.devices) for row in rows],
        "speed": [speed(row.point) for row in rows],
        "baseline": [_baseline(row.curve.baseline) for row in rows],
        "FLOPs": [run_formatting.flops(row.point.config) for row in rows],
        "speed-up": [ratio_figure(row.curve.speedup(row.point), 2) for row in rows],
        **_efficiency(rows),
        **{part: [_part(loss, part) for loss in losses] for part in told},
        **if_told("trace", [_trace(loss.traced) for loss in losses]),
        **if_told("slowest rank", [_slowest(loss.slowest) for loss in losses]),
        "launches": [str(len(row.point.runs)) for row in rows],
        **if_told("machine drift", [_drift(row) for row in rows]),
        "flags": [_flags(row) for row in rows],
        "record": [run_formatting.record(row.point.middle) for row in rows],
    }


def _efficiency(rows: Sequence[_Row]) -> Columns:
    """Beside what was lost; where devices share cores, most of that is no loss."""
    told = [figure(row.curve.efficiency(row.point), "{:.1%}") for row in rows]
    missing = [f"{row.loss.share:z.1%}" for row in rows]
    if rows[0].curve.threads is None:
        return {"efficiency": told, "lost share": missing}
    ideal = [row.curve.ideal(row.point) for row in rows]
    lost = [row.loss.share - (1 - share) for row, share in zip(rows, ideal, strict=True)]
    return {
        "efficiency": told,
        "1/n": [f"{share:.1%}" for share in ideal],
        "lost beyond 1/n": [f"{share:z.1%}" for share in lost],
        "lost share": missing,
    }


def _baseline(point: MeasuredPoint) -> str:
    launches = f", {len(point.runs)} launches" if len(point.runs) > 1 else ""
    about = f"{count(point.devices, 'device')}{_micro_batches(point.config)}{launches}"
    return f"{about}: {speed(point)}"


def _drift(row: _Row) -> str:
    differed = row.curve.drift(row.point)
    return "" if differed is None else f"{differed:.1%}"


def _part(loss: TimeLost, part: LossPart) -> str:
    return f"{loss.parts[part]:z.1%}" if part in loss.parts else "not measured"


def _trace(traced: Traced | None) -> str:
    if traced is None:
        return ""
    before = "not traced" if traced.baseline_idle is None else f"{traced.baseline_idle:.1%}"
    took = f"traced steps take {traced.slowdown:.2f} x as long"
    return f"{took}, idle {traced.idle:.1%} (baseline {before})"


def _slowest(slowest: Slowest | None) -> str:
    if slowest is None:
        return ""
    return f"rank {slowest.rank} in {slowest.share:.0%}, {slowest.chance:.0%} by chance"


def _flags(row: _Row) -> str:
    """Of the point, then of the baseline."""
    own, before = flags_of(row.point), flags_of(row.curve.baseline)
    return "; ".join(filter(None, [own, before and f"baseline: {before}"])) or "none"


def _remarks(rows: Sequence[_Row]) -> Iterable[Remark]:
    for row in rows:
        both = (row.curve.baseline, row.point)
        told = [*row.curve.remarks, *row.loss.caveats, *why_not_fitted(row.laws)]
        if any(len(point.runs) > 1 for point in both):
            told.append(
                "the parts of the lost share are those of the middle launch, whose record is linked"
            )
        told += [f"no interval: {escaped(p.rate.reason)}" for p in both if p.rate.reason]
        yield from ((remark, row.number) for remark in told)


# ---------------------------------------------------------------------------------- laws


def _laws(rows: Sequence[_Row], place: Columns) -> Iterable[tuple[str, ...]]:
    """A row for each law that could be fitted."""
    for index, row in enumerate(rows):
        if row.point is row.curve.points[-1]:
            own = [other.number for other in rows if other.curve is row.curve]
            about = [f"{head} {values[index]}" for head, values in place.items()]
            curve = ", ".join([row.curve.scaling, *about])
            for law in row.laws:
                if law.reason is None:
                    told = law_cells(law, is_split=row.curve.threads is not None)
                    yield TITLES[law.name], f"{curve} ({numbers_in_words(own)})", *told


# ---------------------------------------------------------------------------------- conditions


def _apart(curve: Curve) -> list[str]:
    """Fewer threads where more ranks share the cores are told as the split that they are."""
    runs = [run for point in curve.points for run in point.runs]
    lines, split = curve.differing_conditions, _split_of_cores(curve)
    alike = [without_threads(run.record) for run in runs]
    if split is not None and not any(map(_is_of_processors, differences(alike))):
        lines = tuple(split if _is_of_processors(line) else line for line in lines)
    return in_words(lines, runs)


def _is_of_processors(line: str) -> bool:
    return line.startswith(PROCESSORS)


def _split_of_cores(curve: Curve) -> str | None:
    """In words: threads of a rank by the count of devices; None where no cores are shared."""
    if curve.threads is None:
        return None
    counts = [
        f"{threads} on {count(point.devices, 'device')}"
        for threads, point in zip(curve.threads, curve.points, strict=True)
    ]
    return f"{PROCESSORS}: threads per rank, {', '.join(counts)}, because the ranks share the cores"
