"""Recomputes the numbers of rows and records, and reports which contradict each other.

Rows are checked as data: `lint` compares the pages byte for byte with what these rows give.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from scaling.analysis.efficiency import Curve, MeasuredPoint, find_curves
from scaling.report.rows import Row
from scaling.store.run import Run
from unitransformer.costs.flops import count_flops, count_parameters
from unitransformer.costs.mfu import MfuRow
from unitransformer.machine.calibration_store import read_ceiling
from unitransformer.measure.nvml import energy_between_samples
from unitransformer.record import metrics
from unitransformer.record.fields import agree, look_up
from unitransformer.record.units import perplexity

MFU_FIELDS = ("flops_per_unit", "flops_per_s", "utilisation", "share_of_ceiling")
TOLERANCE = 1e-6  # relative; the numbers are quotients of one another
LAST_DIGIT = 0.0005  # efficiencies are printed as percentages with one decimal

Finding = tuple[str, str]  # where, what


def check_rows(rows: Iterable[Row], runs: Sequence[Run]) -> Iterator[Finding]:
    """Yields contradictions within a row, and between a row and the MFU report of its record.

    Args:
        runs: those that ended well, with their cells.
    """
    by_name = {run.name: run for run in runs}
    for row in rows:
        where = row.record or row.command
        yield from ((where, what) for what in _check_row(row))
        if run := by_name.get(row.record or ""):
            yield from ((where, what) for mfu in run.mfu for what in _check_mfu(mfu, row, run))


def check_efficiencies(runs: Iterable[Run]) -> Iterator[Finding]:
    """Yields wrong ratios of rates."""
    for where, curve, point in _points(runs):
        per_device, baseline = (p.rate.value / p.devices for p in (point, curve.baseline))
        given, source = curve.efficiency(point).value, "the ratio of the rates per device"
        for what in _compare("efficiency", given, per_device / baseline, source):
            yield where, what


def find_superlinear(runs: Iterable[Run]) -> Iterator[Finding]:
    """Yields efficiencies above 1 that do not only seem so by their interval.

    Noise of a launch without an interval can cause one, or work that fits in a cache only when it
    is divided: a reader should look at it, and nothing contradicts it.
    """
    for where, curve, point in _points(runs):
        efficiency = curve.efficiency(point)
        least = efficiency.value if efficiency.low is None else efficiency.low
        if least > 1 + LAST_DIGIT:
            ends = "no interval" if efficiency.low is None else f"an interval from {least:.4f}"
            yield where, f"efficiency is {efficiency.value:.4f}, above 1, with {ends}"


def _points(runs: Iterable[Run]) -> Iterator[tuple[str, Curve, MeasuredPoint]]:
    for curve in find_curves(runs):
        for point in curve.points:
            devices = f"{point.devices} devices ({', '.join(run.name for run in point.runs)})"
            yield f"{curve.scaling} scaling of {curve.strategy} on {devices}", curve, point


def _check_row(row: Row) -> Iterator[str]:
    for name, low, middle, high in (
        ("step_s", row.low_step_s, row.median_step_s, row.high_step_s),
        ("units_per_s", row.low_units_per_s, row.units_per_s, row.high_units_per_s),
    ):
        known = [value for value in (low, middle, high) if value is not None]
        if len(known) == 3 and known != sorted(known):
            yield f"{name} {middle} is not between {low} and {high}"
    parts = (row.batch_size, row.accumulate, row.devices, row.num_nodes)
    samples, per_device = row.global_batch_size, row.units_per_s_per_device
    yield from _compare("global_batch_size", samples, _product(parts), "x".join(map(str, parts)))
    devices = _product((row.devices, row.num_nodes))
    source = f"{per_device} on each of {devices} devices"
    yield from _compare("units_per_s", row.units_per_s, _product((per_device, devices)), source)
    positions = 1 if row.unit == "images" else row.sequence_length
    for name, rate, per_step, thing in (
        ("samples_per_s", row.samples_per_s, samples, "samples"),
        ("units_per_s", row.units_per_s, _product((samples, positions)), row.unit),
    ):
        given = _product((rate, row.median_step_s))
        yield from _compare(f"{name} x median_step_s", given, per_step, f"the {thing} of a step")


def _check_mfu(mfu: MfuRow, row: Row, run: Run) -> Iterator[str]:
    where = f"mfu.{mfu.convention}"
    rate, devices = run.record.get(f"{run.unit}s_per_s"), run.config.parallel.world_size
    yield from _compare(
        f"{where}.flops_per_s",
        mfu.flops_per_s,
        _product((rate, mfu.flops_per_unit, 1 / devices)),
        f"{rate} {run.unit}s a second of {mfu.flops_per_unit:.4g} FLOP on {devices} devices",
    )
    shares = {mfu.kind.lower(): mfu.utilisation, "share_of_ceiling": mfu.share_of_ceiling}
    for kind, share in shares.items():
        if getattr(row, name := f"{kind}_{mfu.convention}") != share:
            yield f"{name} is {getattr(row, name)}; {where} of the record says {share}"
    if mfu.share_of_ceiling is not None and mfu.share_of_ceiling > 1 and not mfu.flag:
        yield f"{where}.share_of_ceiling is {mfu.share_of_ceiling:.3f}, above 1 without a flag"


def _compare(name: str, given: Any, expected: Any, source: str) -> Iterator[str]:
    is_known = given is not None and expected is not None
    if is_known and not math.isclose(given, expected, rel_tol=TOLERANCE):
        yield f"{name} is {given:.7g}; {source} make {expected:.7g}"


def _product(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return None if len(known) < len(parts) else math.prod(known)


def find_contradictions(run: Run) -> list[str]:
    """Returns the derived fields of an `ok` run that its samples and config contradict."""
    rate, record = f"{run.unit}s_per_s", run.record
    steady = metrics.recorded_steady_state(record)
    recomputed = metrics.compute_metrics(
        record["step_s"],
        record["samples"],
        steady,
        segment_starts=record["segment_starts"],
        units_per_step=run.units_per_step,
    )
    derived = {} if recomputed is None else recomputed.as_dict()
    validation = record["validation"]
    fields: dict[str, tuple[Any, Any]] = {rate: (record.get(rate), derived.get("units_per_s"))}
    for name in sorted(record["metrics"].keys() | derived.keys()):
        fields[f"metrics.{name}"] = (record["metrics"].get(name), derived.get(name))
    first = record["segment_starts"][-1]
    steps = {first + step for step in steady.steps(len(record["step_s"]) - first)}
    for rank, gpu in enumerate(record["gpu"]):
        if gpu is not None:
            for name, energy in energy_between_samples(gpu["samples"], steps).as_dict().items():
                fields[f"gpu.{rank}.{name}"] = (gpu.get(name), energy)
    fields["num_parameters"] = (record["num_parameters"], count_parameters(run.config.model))
    if validation["metric"] == "perplexity":  # an accuracy cannot be recomputed
        fields["validation.value"] = (validation["value"], perplexity(validation["loss"]))
    wrong_ceilings = []
    for rank, ceiling in enumerate(record["ceiling"]):
        try:
            if ceiling is not None:
                read_ceiling(ceiling, f"ceiling.{rank}")
        except ValueError as error:
            wrong_ceilings.append(str(error))
    return [*wrong_ceilings, *_differences(fields)]


def find_recounts(run: Run) -> list[str]:
    """Returns where the current code counts FLOPs, MFU or the start of the steady state differently
    from the version that wrote the record."""
    record = run.record
    steady = metrics.find_last_steady_state(
        record["step_s"], segment_starts=record["segment_starts"], excluded_steps=run.excluded_steps
    )
    start = None if steady.start is None else record["segment_starts"][-1] + steady.start
    fields: dict[str, tuple[Any, Any]] = {"steady_from": (record["steady_from"], start)}
    for name, count in count_flops(run.config).items():
        field = f"flops_per_{run.unit}.{name}"
        fields[field] = (look_up(record, field), count)
    stored = {row.convention: row for row in run.mfu}
    hosts, ceilings = record["hardware"], record["ceiling"]
    for row in metrics.compute_mfu(run.config, run.units_per_s, hosts, ceilings):
        for name in MFU_FIELDS:
            before = getattr(stored.get(row.convention), name, None)
            fields[f"mfu.{row.convention}.{name}"] = (before, getattr(row, name))
    return _differences(fields)


def _differences(fields: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"{field} is {_text(stored)} in the record, {_text(derived)} by its samples and config"
        for field, (stored, derived) in fields.items()
        if not agree(stored, derived)
    ]


def _text(value: Any) -> str:
    return "nothing" if value is None else repr(value)
