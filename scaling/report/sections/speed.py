"""Speed, memory and FLOPs of one run, as tables: each figure with what it stands on."""

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
from unitransformer.config import RunConfig
from unitransformer.costs.mfu import MfuRow
from unitransformer.measure.nvml import HARMLESS
from unitransformer.record.metrics import (
    flops_rate_in_words,
    launches_in_words,
    parts_in_words,
    share_in_words,
)
from unitransformer.record.schema import Record
from unitransformer.record.units import count, ms, rate_in_words, si
from unitransformer.stats.comparisons import MIN_LAUNCHES, pays_off_at, split_variance

LONGEST_VALUE = 340  # letters of a cell


def figures_table(run: Run, others: Sequence[Run]) -> str:
    rows = [
        ("steady state", _steady(run)),
        ("median steady step", _median_step(run)),
        ("speed", _explained_speed(run)),
        ("mean speed", _mean_speed(run)),
        ("where the time goes", _shares(run)),
        ("ceiling of this machine, in this job", _ceiling(run)),
        ("peak memory", run_formatting.memory(run)),
        ("energy", _energy(run)),
        *([("GPU", escaped(state))] if (state := gpu_state(run.record)) else []),
        ("compile", _compile(run, others)),
        ("launches", _launches(run, [other for other in others if other.config == run.config])),
        ("flags", run_formatting.flags(run)),
        ("spread over", run_formatting.devices(run)),
        ("batch", run_formatting.batch(run)),
        ("precision", f"{run.config.parallel.precision}, compile {run.config.parallel.compile}"),
        ("seed", str(run.config.seed)),
        ("started", escaped(str(run.record.get("started_at") or "not recorded"))),
    ]
    return table(
        ("figure", "value"), [(name, shortened(value, LONGEST_VALUE)) for name, value in rows]
    )


def _steady(run: Run) -> str:
    if run.metrics is None:
        return run_formatting.too_short(run)
    first = run.record["steady_from"] + 1
    launches = len(run.record["segment_starts"])
    after = f", in the last of {launches} launches" if launches > 1 else ""
    left_out = [item for item in run.record["excluded_steps"] if item["step"] >= first]
    but = "".join(f"; without step {item['step'] + 1}: {item['reason']}" for item in left_out)
    return (
        f"steps {first} to {run.num_steps}, {count(run.metrics.step.count, 'step')}{after}: "
        f"{escaped(run.record['steady_method'] + but)}"
    )


def _median_step(run: Run) -> str:
    if run.metrics is None:
        return run_formatting.too_short(run)
    step, cpu_s = run.metrics.step, run.metrics.median_cpu_s
    told = f"{ms(step.median)}, median absolute deviation {ms(step.mad)}"
    if step.low is not None and step.high is not None:
        told += f"; {ms(step.low)} to {ms(step.high)}"
    busy = f"; processor time {ms(cpu_s)}" if run.config.parallel.accelerator == "cpu" else ""
    return f"{told}{busy}; {escaped(run.metrics.interval)}"


def _explained_speed(run: Run) -> str:
    if run.metrics is None:
        return run_formatting.too_short(run)
    units = count(run.units_per_step, run.unit)
    return f"{run_formatting.speed(run)}: {units} per step, over that median"


def _mean_speed(run: Run) -> str:
    if run.metrics is None:
        return run_formatting.too_short(run)
    rate = rate_in_words(run.metrics.mean_units_per_s, f"{run.unit}s")
    between = run.metrics.between_steps_share
    told = f"{rate}: all {run.unit}s over all seconds of the steady steps, stalls included"
    if between is None:
        return f"{told}; seconds between them (log lines, saving, pauses) are not recorded"
    return f"{told}, and of those between them (log lines, saving, pauses), {between:.1%} of all"


def _shares(run: Run) -> str:
    if run.metrics is None:
        return run_formatting.too_short(run)
    told = parts_in_words(run.metrics.as_dict())
    if run.config.parallel.world_size == 1 or "communication_s" in run.metrics.shares:
        return told
    reason = run.record.get("samples_missing", {}).get("communication_s")
    why = "`--trace` measures it" if reason is None else escaped(str(reason))
    return f"{told}; communication is contained in these, {why}"


def _ceiling(run: Run) -> str:
    measured = [ceiling for ceiling in run.record["ceiling"] if ceiling is not None]
    if not measured:
        return "not measured: `--ceiling-s` was 0, or the run did not end well"
    best = max(measured, key=lambda ceiling: float(ceiling["matmul_flops_per_s"]))
    ranks = "" if len(measured) == 1 else f", the best of {len(measured)} ranks at once"
    return (
        f"{si(best['matmul_flops_per_s'])}FLOP/s in {escaped(best['dtype'])} matrix products, "
        f"{si(best['copy_bytes_per_s'])}B/s copied (read and written){ranks}"
    )


def _compile(run: Run, others: Sequence[Run]) -> str:
    ledger = run.record["compile"][0]
    if ledger["mode"] == "off":
        return "off"
    seconds = ledger["compile_s"]
    told = [
        f"{ledger['mode']}, {ledger['start'] or 'start not recorded'}",
        "seconds not recorded" if seconds is None else f"{seconds:.1f} s of compiling",
        "graphs not recorded" if ledger["graphs"] is None else count(ledger["graphs"], "graph"),
        count(len(ledger["graph_breaks"]), "graph break"),
        count(len(ledger["recompiles"]), "recompile"),
    ]
    places = [f"break at {item['where']}: {item['reason']}" for item in ledger["graph_breaks"]]
    places += [
        f"step {item['step']}: {item['function']}: {item['reason'] or 'reason not recorded'}"
        for item in ledger["recompiles"]
    ]
    return escaped("; ".join([", ".join(told), *places, _payoff(run, others)]))


def _payoff(run: Run, others: Sequence[Run]) -> str:
    """When compiling has caught up with the same run that was not compiled."""
    eager = [other for other in others if other.metrics and _compiled(other, run) == run.config]
    seconds = run.record["compile"][0]["compile_s"]
    if not eager or run.metrics is None or seconds is None:
        return "when it pays off is unknown: there is no run like this without compiling"
    assert eager[0].metrics is not None
    slow_s, fast_s = eager[0].metrics.step.median, run.metrics.step.median
    step = pays_off_at(seconds, slow_s, fast_s)
    when = "never pays off" if step is None else f"pays off at step {step:,}"
    told = f"{when}: a step takes {ms(fast_s)}, not compiled {ms(slow_s)}"
    return "; ".join([told, *differences([run.record, eager[0].record])])


def _compiled(run: Run, like: Run) -> RunConfig | None:
    """The config of a run that was not compiled, were it compiled."""
    parallel = run.config.parallel
    if parallel.compile != "off":
        return None
    mode = like.config.parallel.compile
    return replace(run.config, parallel=replace(parallel, compile=mode))


def _energy(run: Run) -> str:
    """Joules a token or picture of all devices, by their own counters."""
    gpus = run.record["gpu"]
    told = [
        gpu
        for gpu in gpus
        if gpu is not None and gpu["joules"] is not None and gpu["joules_num_steps"]
    ]
    if not told or len(told) < len(gpus):
        return f"blank: {escaped(_why_no_joules(run))}"
    step_j = math.fsum(gpu["joules"] / gpu["joules_num_steps"] for gpu in told)
    steps = min(gpu["joules_num_steps"] for gpu in told)
    return (
        f"{step_j / run.units_per_step:.3g} J per {run.unit}, of {count(len(told), 'device')}, "
        f"by {count(steps, 'steady step')}"
    )


def _why_no_joules(run: Run) -> str:
    for gpu in run.record["gpu"]:
        if gpu is not None and gpu["joules"] is None:
            reason = gpu["missing"].get("all") or gpu["missing"].get("joules")
            return str(reason or "not told by the record")
    return "not told by the record"


def _launches(run: Run, again: Sequence[Run]) -> str:
    """Repeats of the whole launch: how much of the scatter is theirs."""
    runs = [each for each in (run, *again) if each.metrics is not None]
    if len(runs) < MIN_LAUNCHES:
        return "1: its interval says nothing about another launch; use `--repeats`"
    told = f"{len(runs)}: {launches_in_words(split_variance([each.launch for each in runs]))}"
    apart = differences([each.record for each in runs])
    return escaped("; ".join([told, *apart]))


def passport_tables(run: Run) -> list[str]:
    """What each way of counting says, beside the peak and the ceiling, with the rate's interval."""
    figures = {} if run.metrics is None else run.metrics.as_dict()
    headers = (
        *(
            "convention",
            f"FLOPs per {run.unit}",
            "FLOP/s per device",
            "share of the data sheet's peak",
        ),
        *("share of the ceiling", "what it counts"),
    )
    rows = [
        (
            f"`{row.convention}`",
            f"{row.flops_per_unit:,.0f}",
            "unknown" if row.flops_per_s is None else flops_rate_in_words(row.flops_per_s, figures),
            _utilisation(row, figures),
            _share_of_ceiling(row, figures),
            escaped(row.definition),
        )
        for row in run.mfu
    ]
    first = run.mfu[0]
    source = ""
    if first.peak_flops_per_s is not None:
        remark = f"; {first.peak_remark}" if first.peak_remark else ""
        source = (
            f"Data sheet: {si(first.peak_flops_per_s)}FLOP/s dense in {first.dtype}, "
            f"{first.peak_source}{remark}."
        )
    columns = {head: [row[index] for row in rows] for index, head in enumerate(headers)}
    return [*draw(columns, headers[:1]), escaped(source)]


def _utilisation(row: MfuRow, figures: Mapping[str, Any]) -> str:
    if row.utilisation is None:
        return f"none: {escaped(str(row.reason))}"
    return f"{row.kind} {share_in_words(row.utilisation, figures)}"


def _share_of_ceiling(row: MfuRow, figures: Mapping[str, Any]) -> str:
    share = row.share_of_ceiling
    told = "unknown" if share is None else share_in_words(share, figures)
    return f"{told}; {escaped(row.flag)}" if row.flag else told


Sample = Mapping[str, Any]  # a `GpuSample` as the record holds it

SHOWN = (
    ("SM clock", "sm_clock_hz", 1e6, "MHz"),
    ("memory clock", "memory_clock_hz", 1e6, "MHz"),
    ("power", "power_w", 1, "W"),
    ("temperature", "temperature_c", 1, "°C"),
)


def gpu_state(record: Record) -> str:
    """Empty for a run without GPU samples."""
    watched = [gpu["samples"] for gpu in record["gpu"] if gpu is not None and gpu["samples"]]
    if not watched:
        return ""
    first, last = ([samples[place] for samples in watched] for place in (0, -1))
    told = [
        f"{name} {_range(first, field, scale)} to {_range(last, field, scale)} {unit}"
        for name, field, scale, unit in SHOWN
    ]
    devices = "" if len(watched) == 1 else f", of {len(watched)} devices"
    return "; ".join([f"first and last sample{devices}: {', '.join(told)}", _throttled(watched)])


def _range(samples: Sequence[Sample], field: str, scale: float) -> str:
    """Over devices."""
    values = sorted(
        {round(sample[field] / scale) for sample in samples if sample[field] is not None}
    )
    if not values:
        return "?"
    return str(values[0]) if len(values) == 1 else f"({values[0]} … {values[-1]})"


def _throttled(watched: Sequence[Sequence[Sample]]) -> str:
    samples = [s for device in watched for s in device if s["clock_reasons"] is not None]
    if not samples:
        return "throttle reasons not available from the driver"
    reasons = Counter(reason for sample in samples for reason in sample["clock_reasons"])
    told = [
        f"{reason} in {number}"
        for reason, number in reasons.most_common()
        if reason not in HARMLESS
    ]
    return f"throttle reasons: {', '.join(told) or 'none'} of {count(len(samples), 'sample')}"
