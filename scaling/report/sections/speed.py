"""Shows speed, memory and FLOPs of one run as tables, each figure with its basis."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scaling.markdown import escaped, shortened, table
from scaling.report import run_formatting
from scaling.report.table_notes import draw
from scaling.store.conditions import differences
from scaling.store.run import Run
from unitransformer.measure.nvml import HARMLESS
from unitransformer.record.metrics import (
    format_flops_rate,
    format_launch_variance,
    format_share,
    format_time_shares,
)
from unitransformer.record.schema import Record
from unitransformer.record.units import format_count, format_ms, format_rate, format_si
from unitransformer.stats.comparisons import MIN_LAUNCHES, pays_off_at, split_variance

LONGEST_VALUE = 340  # characters of a cell

Sample = Mapping[str, Any]  # a `GpuSample` as the record holds it

GPU_FIGURES = (
    ("SM clock", "sm_clock_hz", 1e6, "MHz"),
    ("memory clock", "memory_clock_hz", 1e6, "MHz"),
    ("power", "power_w", 1, "W"),
    ("temperature", "temperature_c", 1, "°C"),
)


def figures_table(run: Run, others: Sequence[Run]) -> str:
    """Returns a row per figure; `others` are runs of the same recipe to compare with."""
    rows = {
        **_speed(run),
        "ceiling of this machine, in this job": _ceiling(run),
        "peak memory": run_formatting.memory(run),
        "energy": _energy(run),
        "GPU": escaped(gpu_state(run.record)),
        "compile": _compile(run, others),
        "launches": _launches(run, others),
        "flags": run_formatting.flags([run]) or "none",
        "devices": run_formatting.devices(run),
        "batch": run_formatting.batch(run),
        "precision": f"{run.config.parallel.precision}, compile {run.config.parallel.compile}",
        "seed": str(run.config.seed),
        "started": escaped(str(run.record.get("started_at") or "not recorded")),
    }
    cells = [(name, shortened(value, LONGEST_VALUE)) for name, value in rows.items() if value]
    return table(("figure", "value"), cells)


def _speed(run: Run) -> dict[str, str]:
    names = ("steady state", "median steady step", "speed", "mean speed", "where the time goes")
    if run.metrics is None:
        return dict.fromkeys(names, run_formatting.no_steady_state(run))
    step, units = run.metrics.step, format_count(run.units_per_step, run.unit)
    median = f"{format_ms(step.median)}, median absolute deviation {format_ms(step.mad)}"
    if step.low is not None and step.high is not None:
        median += f"; {format_ms(step.low)} to {format_ms(step.high)}"
    if run.config.parallel.accelerator == "cpu":
        median += f"; processor time {format_ms(run.metrics.median_cpu_s)}"
    rate = format_rate(run.metrics.mean_units_per_s, f"{run.unit}s")
    between = run.metrics.between_steps_share
    mean = f"{rate}: all {run.unit}s over all seconds of the steady steps, stalls included"
    if between is None:
        mean += "; seconds between them (log lines, saving, pauses) are not recorded"
    else:
        mean += f", and of those between them (log lines, saving, pauses), {between:.1%} of all"
    shares = format_time_shares(run.metrics.as_dict())
    if run.config.parallel.world_size > 1 and "communication_s" not in run.metrics.shares:
        reason = run.record.get("samples_missing", {}).get("communication_s")
        why = "`--trace` measures it" if reason is None else escaped(str(reason))
        shares += f"; communication is contained in these, {why}"
    values = (
        _steady(run, step.count),
        f"{median}; {escaped(run.metrics.interval)}",
        f"{run_formatting.speed(run)}: {units} per step, over that median",
        mean,
        shares,
    )
    return dict(zip(names, values, strict=True))


def _steady(run: Run, num_steps: int) -> str:
    first = run.record["steady_from"] + 1
    segments = len(run.record["segment_starts"])
    after = f", in the last of {segments} segments" if segments > 1 else ""
    excluded: dict[str, list[str]] = {}
    for item in run.record["excluded_steps"]:
        excluded.setdefault(item["reason"], []).append(str(item["step"] + 1))
    but = "".join(
        f"; without step{'s' * (len(steps) > 1)} {', '.join(steps)}: {reason}"
        for reason, steps in excluded.items()
    )
    return (
        f"steps {first} to {run.num_steps}, {format_count(num_steps, 'step')}{after}: "
        f"{escaped(run.record['steady_method'] + but)}"
    )


def _ceiling(run: Run) -> str:
    measured = [ceiling for ceiling in run.record["ceiling"] if ceiling is not None]
    if not measured:
        return "not measured: `--ceiling-s` was 0, or the run did not end well"
    best = max(measured, key=lambda ceiling: float(ceiling["matmul_flops_per_s"]))
    ranks = "" if len(measured) == 1 else f", the best of {len(measured)} ranks at once"
    return (
        f"{format_si(best['matmul_flops_per_s'])}FLOP/s in {escaped(best['dtype'])} matrix "
        f"products, {format_si(best['copy_bytes_per_s'])}B/s copied (read and written){ranks}"
    )


def _compile(run: Run, others: Sequence[Run]) -> str:
    ledger = run.record["compile"][0]
    if ledger["mode"] == "off":
        return "off"
    seconds, graphs = ledger["compile_s"], ledger["graphs"]
    parts = [
        f"{ledger['mode']}, {ledger['start'] or 'start not recorded'}",
        "seconds not recorded" if seconds is None else f"{seconds:.1f} s of compiling",
        "graphs not recorded" if graphs is None else format_count(graphs, "graph"),
        format_count(len(ledger["graph_breaks"]), "graph break"),
        format_count(len(ledger["recompiles"]), "recompile"),
    ]
    places = [f"break at {item['where']}: {item['reason']}" for item in ledger["graph_breaks"]]
    places += [
        f"step {item['step']}: {item['function']}: {item['reason'] or 'reason not recorded'}"
        for item in ledger["recompiles"]
    ]
    return escaped("; ".join([", ".join(parts), *places, _payoff(run, others)]))


def _payoff(run: Run, others: Sequence[Run]) -> str:
    """When compiling has made up for its time, against the same run without compiling."""
    config = replace(run.config, parallel=replace(run.config.parallel, compile="off"))
    eager = next((other for other in others if other.metrics and other.config == config), None)
    seconds = run.record["compile"][0]["compile_s"]
    if eager is None or eager.metrics is None or run.metrics is None or seconds is None:
        return "when it pays off is unknown: there is no run like this without compiling"
    slow_s, fast_s = eager.metrics.step.median, run.metrics.step.median
    step = pays_off_at(seconds, slow_s, fast_s)
    when = "never pays off" if step is None else f"pays off at step {step:,}"
    steps = f"{when}: a step takes {format_ms(fast_s)}, not compiled {format_ms(slow_s)}"
    return "; ".join([steps, *differences([run.record, eager.record])])


def _energy(run: Run) -> str:
    """Joules per token or image of all devices, from their energy counters."""
    gpus = [gpu or {} for gpu in run.record["gpu"]]
    counted = [gpu for gpu in gpus if gpu.get("joules") is not None and gpu["joules_num_steps"]]
    if not counted or len(counted) < len(gpus):
        missing = [gpu["missing"] for gpu in gpus if gpu and gpu["joules"] is None]
        reasons = [names.get("all") or names.get("joules") for names in missing[:1]]
        return f"not measured: {escaped(str(reasons[0]))}" if any(reasons) else "not recorded"
    step_j = math.fsum(gpu["joules"] / gpu["joules_num_steps"] for gpu in gpus)
    steps = format_count(min(gpu["joules_num_steps"] for gpu in gpus), "steady step")
    devices = format_count(len(gpus), "device")
    return f"{step_j / run.units_per_step:.3g} J per {run.unit}, of {devices}, over {steps}"


def _launches(run: Run, others: Sequence[Run]) -> str:
    """How much of the scatter of repeated launches is between launches."""
    runs = [launch for launch in (run, *others) if launch.config == run.config and launch.metrics]
    if len(runs) < MIN_LAUNCHES:
        return "1: its interval says nothing about another launch; use `--repeats`"
    variance = format_launch_variance(split_variance([launch.launch for launch in runs]))
    conditions = differences([launch.record for launch in runs])
    return escaped("; ".join([f"{len(runs)}: {variance}", *conditions]))


def mfu_tables(run: Run) -> list[str]:
    """Returns a row per FLOP convention, with the peak, the ceiling and the rate's interval."""
    figures = {} if run.metrics is None else run.metrics.as_dict()
    rows = []
    for row in run.mfu:
        rate, of_peak, of_ceiling = "unknown", f"none: {escaped(str(row.reason))}", "unknown"
        if row.flops_per_s is not None:
            rate = format_flops_rate(row.flops_per_s, figures)
        if row.utilisation is not None:
            of_peak = f"{row.kind} {format_share(row.utilisation, figures)}"
        if row.share_of_ceiling is not None:
            of_ceiling = format_share(row.share_of_ceiling, figures)
        cells = {
            "convention": f"`{row.convention}`",
            f"FLOPs per {run.unit}": f"{row.flops_per_unit:,.0f}",
            "FLOP/s per device": rate,
            "share of the data sheet's peak": of_peak,
            "share of the ceiling": f"{of_ceiling}; {escaped(row.flag)}"
            if row.flag
            else of_ceiling,
            "what it counts": escaped(row.definition),
        }
        rows.append(cells)
    first, source = run.mfu[0], ""
    if first.peak_flops_per_s is not None:
        remark = f"; {first.peak_remark}" if first.peak_remark else ""
        source = (
            f"Data sheet: {format_si(first.peak_flops_per_s)}FLOP/s dense in {first.dtype}, "
            f"{first.peak_source}{remark}."
        )
    return [*draw(rows, always=("convention",)), escaped(source)]


def gpu_state(record: Record) -> str:
    """Returns clocks, power and temperature of all GPUs; empty without GPU samples."""
    devices = [gpu["samples"] for gpu in record["gpu"] if gpu is not None and gpu["samples"]]
    if not devices:
        return ""
    first, last = ([samples[place] for samples in devices] for place in (0, -1))
    figures = [
        f"{name} {_range(first, field, scale)} to {_range(last, field, scale)} {unit}"
        for name, field, scale, unit in GPU_FIGURES
    ]
    of_devices = "" if len(devices) == 1 else f", of {len(devices)} devices"
    samples = [sample for device in devices for sample in device]
    return f"first and last sample{of_devices}: {', '.join(figures)}; {_throttled(samples)}"


def _range(samples: Sequence[Sample], field: str, scale: float) -> str:
    values = sorted({round(s[field] / scale) for s in samples if s[field] is not None})
    if len(values) > 1:
        return f"({values[0]} … {values[-1]})"
    return str(values[0]) if values else "?"


def _throttled(samples: Sequence[Sample]) -> str:
    known = [s["clock_reasons"] for s in samples if s["clock_reasons"] is not None]
    if not known:
        return "throttle reasons not available from the driver"
    reasons = Counter(reason for sample in known for reason in sample)
    parts = [f"{name} in {n}" for name, n in reasons.most_common() if name not in HARMLESS]
    return f"throttle reasons: {', '.join(parts) or 'none'} of {format_count(len(known), 'sample')}"
