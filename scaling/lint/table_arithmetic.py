"""Checks that the numbers of a report's rows agree with each other and with their records.

It checks the rows as data: `lint` compares the pages byte for byte with what these rows give.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from scaling.analysis.efficiency import Curve, MeasuredPoint, find_curves
from scaling.report.rows import Row
from scaling.store.run import Run
from unitransformer.costs.mfu import MfuRow

TOLERANCE = 1e-6  # relative; the numbers are quotients of one another
LAST_DIGIT = 0.0005  # efficiencies are printed as percentages with one decimal

Finding = tuple[str, str]  # where, what


def check_rows(rows: Iterable[Row], runs: Sequence[Run]) -> Iterator[Finding]:
    """Yields contradictions within a row, and between a row and the MFU report of its record."""
    ok_runs = {run.name: run for run in runs if run.is_ok}
    for row in rows:
        where = row.record or row.command
        yield from ((where, what) for what in _check_row(row))
        if row.record in ok_runs:
            run = ok_runs[row.record]
            for mfu in run.mfu:
                yield from ((where, what) for what in _check_mfu(mfu, row, run))


def check_efficiencies(runs: Iterable[Run]) -> Iterator[Finding]:
    """Yields efficiencies above 1 whose interval excludes 1, and wrong ratios of rates."""
    for curve in find_curves(runs):
        for point in curve.points:
            records = ", ".join(run.name for run in point.runs)
            devices = f"{point.devices} devices ({records})"
            where = f"{curve.scaling} scaling of {curve.strategy} on {devices}"
            yield from ((where, what) for what in _check_efficiency(curve, point))


def _check_row(row: Row) -> Iterator[str]:
    yield from _check_interval("step_s", row.median_step_s, row.low_step_s, row.high_step_s)
    yield from _check_interval(
        "units_per_s", row.units_per_s, row.low_units_per_s, row.high_units_per_s
    )
    parts = (row.batch_size, row.accumulate, row.devices, row.num_nodes)
    samples, per_device = row.global_batch_size, row.units_per_s_per_device
    yield from _compare("global_batch_size", samples, _product(parts), "x".join(map(str, parts)))
    devices = _product((row.devices, row.num_nodes))
    source = f"{per_device} on each of {devices} devices"
    yield from _compare("units_per_s", row.units_per_s, _product((per_device, devices)), source)
    name, per_step = (
        "samples_per_s x median_step_s",
        _product((row.samples_per_s, row.median_step_s)),
    )
    yield from _compare(name, per_step, samples, "the samples of a step")
    positions = 1 if row.unit == "images" else row.sequence_length
    name, per_step = "units_per_s x median_step_s", _product((row.units_per_s, row.median_step_s))
    yield from _compare(name, per_step, _product((samples, positions)), f"the {row.unit} of a step")


def _check_interval(
    name: str, middle: float | None, low: float | None, high: float | None
) -> Iterator[str]:
    if middle is not None and low is not None and high is not None and not low <= middle <= high:
        yield f"{name} {middle} is not between {low} and {high}"


def _check_mfu(mfu: MfuRow, row: Row, run: Run) -> Iterator[str]:
    where = f"mfu.{mfu.convention}"
    rate, devices = run.record.get(f"{run.unit}s_per_s"), run.config.parallel.world_size
    yield from _compare(
        f"{where}.flops_per_s",
        mfu.flops_per_s,
        _product((rate, mfu.flops_per_unit, 1 / devices)),
        f"{rate} {run.unit}s a second of {mfu.flops_per_unit:.4g} FLOP on {devices} devices",
    )
    kind = mfu.kind.lower()
    for name, share in (
        (f"{kind}_{mfu.convention}", mfu.utilisation),
        (f"share_of_ceiling_{mfu.convention}", mfu.share_of_ceiling),
    ):
        if getattr(row, name) != share:
            yield f"{name} is {getattr(row, name)}; {where} of the record says {share}"
    if mfu.share_of_ceiling is not None and mfu.share_of_ceiling > 1 and not mfu.flag:
        yield f"{where}.share_of_ceiling is {mfu.share_of_ceiling:.3f}, above 1 without a flag"


def _check_efficiency(curve: Curve, point: MeasuredPoint) -> Iterator[str]:
    efficiency = curve.efficiency(point)
    least = efficiency.value if efficiency.low is None else efficiency.low
    if least > 1 + LAST_DIGIT:
        ends = "it has no interval" if efficiency.low is None else f"its interval begins at {least}"
        yield f"efficiency is {efficiency.value:.4f}: {ends}, above 1"
    per_device, baseline = (p.rate.value / p.devices for p in (point, curve.baseline))
    yield from _compare(
        "efficiency", efficiency.value, per_device / baseline, "the ratio of the rates per device"
    )


def _compare(name: str, given: Any, expected: Any, source: str) -> Iterator[str]:
    if given is None or expected is None or math.isclose(given, expected, rel_tol=TOLERANCE):
        return
    yield f"{name} is {given:.7g}; {source} make {expected:.7g}"


def _product(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return None if len(known) < len(parts) else math.prod(known)
