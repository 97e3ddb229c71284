"""Formats figures and machines of one run, or of the pooled launches of one configuration.

A figure that is missing has its reason instead.
"""

import functools
import importlib
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist, median
from typing import Any

from scaling.analysis.efficiency import Estimate, MeasuredPoint
from scaling.markdown import escaped, link, shortened
from scaling.store.run import Run
from scaling.stored_command import without_out
from unitransformer.config import ModelConfig, Recipe, RunConfig
from unitransformer.costs.flops import MAIN_CONVENTION, count_flops, count_parameters
from unitransformer.costs.mfu import MfuRow
from unitransformer.record.parameter_summary import human_count
from unitransformer.record.units import (
    UNIT,
    format_bytes,
    format_count,
    format_metric,
    format_rate,
    format_si,
)

TITLES: dict[Recipe, str] = {"bert": "BERT", "gpt": "GPT", "vit": "ViT"}
LONGEST_REMARK = 160  # characters in a table; the record has all of them
MOST_DIGITS = 6  # of a ratio
# The flag of a FLOP convention, written by `unitransformer.costs.mfu`, and how a table has it.
ABOVE_CEILING = re.compile(
    r"(\w+): above the ceiling measured on this machine \((\d+\.\d+) of it\)"
)
OF_CEILING = "x ceiling"
NO_CEILING = "no ceiling was measured in its dtype"
# Names of baselines in records, in the words of a reader who does not know them.
BASELINES = {"unigram entropy": "predicting a token by its frequency"}
ABOUT_CEILING = (
    "6n 1.20 x ceiling: by the FLOP convention `6n` the run computed 1.20 times as fast as the "
    "matrix products measured on the same machine. Then the convention counts work that was not "
    "done, or the measured ceiling is too low."
)
DESCRIBED = (  # fields of a host
    "device", "cpu", "cpu_cores", "memory_bytes", "system", "machine", "device_memory_bytes",
    "threads",
)  # fmt: skip


def label(run: Run) -> str:
    return f"{TITLES[run.config.recipe]} {run.config.size}"


def plot_name(run: Run) -> str:
    return f"{run.config.recipe}-loss.svg"


def devices(run: Run) -> str:
    parallel = run.config.parallel
    nodes = f"{parallel.num_nodes} nodes x " if parallel.num_nodes > 1 else ""
    return f"{nodes}{parallel.devices} x {parallel.accelerator}, strategy {parallel.strategy}"


def device_count(config: RunConfig) -> str:
    """All devices, and on how many nodes if there are several."""
    parallel = config.parallel
    nodes = f" on {parallel.num_nodes} nodes" if parallel.num_nodes > 1 else ""
    return f"{parallel.world_size}{nodes}"


def network(run: Run) -> str:
    """How the ranks communicated, as far as the record says; empty if it does not."""
    ranks = run.record.get("network")
    ranks = ranks if isinstance(ranks, list) else []  # a failed run may have anything there
    ranks = [rank for rank in ranks if isinstance(rank, dict)]
    if run.config.parallel.num_nodes > 1:  # a rank on the first node does not leave it for rank 0
        ranks = [rank for rank in ranks if rank.get("interface") != "lo"] or ranks
    texts = [_network_of(rank) for rank in ranks]
    return "; ".join(dict.fromkeys(texts)) if run.config.parallel.world_size > 1 else ""


def _network_of(rank: Mapping[str, Any]) -> str:
    transport, interface = rank.get("transport"), rank.get("interface")
    text = f"{rank.get('backend')}{f' over {transport}' if transport else ''}"
    if interface:
        is_set = rank.get("interface_from") != "MASTER_ADDR"
        text += f", interface {interface}{'' if is_set else ' (to the first rank)'}"
    return text


def batch(run: Run) -> str:
    config = run.config
    parts = f"{config.batch_size:,} per device"
    if config.accumulate > 1:
        parts += f" x {config.accumulate} micro-batches"
    if config.parallel.world_size > 1:
        parts += f" x {config.parallel.world_size} devices"
    return f"{config.global_batch_size:,} = {parts}" if " x " in parts else parts


def baseline(run: Run) -> tuple[str, str]:
    """The trivial baseline, and whether the run beat it."""
    validation, unknown = run.record["validation"], "no baseline to compare with"
    if (baseline := validation["baseline"]) is None:
        return "none recorded, as for synthetic data", unknown
    name = escaped(baseline_name(baseline))
    if baseline["loss"] is not None:
        ahead, unit = baseline["loss"] - validation["loss"], "nats"
        value = f"{name}, {baseline['loss']:.4f} nats"
    elif baseline["accuracy"] is not None:
        ahead, unit = 100 * (validation["value"] - baseline["accuracy"]), "percentage points"
        value = f"{name}, {baseline['accuracy']:.2%}"
        doubt = _doubt(run, validation["value"], baseline["accuracy"])
        if doubt is not None:
            return value, doubt
    else:
        return f"{name}, whose value is not recorded", unknown
    is_beaten = f"yes, by {ahead:.2f} {unit}" if ahead > 0 else f"**no**, {-ahead:.2f} {unit} short"
    return value, is_beaten


def _doubt(run: Run, accuracy: float, baseline: float) -> str | None:
    """Says that so few images cannot tell an accuracy from the baseline; None if they can.

    Each image is an independent trial; the masked tokens of a text are not.
    """
    if run.config.recipe != "vit":
        return None
    config = run.config
    # The data may have fewer, which is not recorded.
    most = config.batch_size * config.parallel.world_size * config.validation_batches
    if not 0 <= accuracy <= 1 or most < 1:  # lint names such a value
        return None
    low, high = binomial_interval(accuracy, most)
    if not low <= baseline <= high:
        return None
    return (
        f"**not distinguishable**: the 95 % interval of the accuracy on at most {most:,} images is "
        f"{low:.0%} to {high:.0%}"
    )


def binomial_interval(share: float, trials: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a probability from its share of so many trials."""
    z = NormalDist().inv_cdf(0.975)
    middle = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return (middle - half) / (1 + z**2 / trials), (middle + half) / (1 + z**2 / trials)


def baseline_name(baseline: Mapping[str, Any]) -> str:
    name = str(baseline["name"])
    return BASELINES.get(name, name)


def speed(run: Run) -> str:
    """The rate at the median steady step, with its interval."""
    metrics = run.metrics
    if metrics is None:
        return no_steady_state(run)
    low, high = metrics.low_units_per_s, metrics.high_units_per_s
    rate = _rate_with_ends(metrics.units_per_s, f"{run.unit}s", low, high)
    return rate if low is not None else f"{rate}; no interval: {escaped(str(metrics.step.reason))}"


def _rate_with_ends(rate: float, unit: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return format_rate(rate, unit)
    return f"{format_rate(rate, unit)} ({_plain_rate(low)} to {_plain_rate(high)})"


def _plain_rate(rate: float) -> str:
    return format_rate(rate, "").removesuffix(" /s")


def no_steady_state(run: Run) -> str:
    return f"no steady state: {escaped(str(run.record['no_steady_state_reason']))}"


def mfu_row(run: Run) -> MfuRow:
    """The row of the convention that the overview shows."""
    return next(row for row in run.mfu if row.convention == MAIN_CONVENTION)


def share_of_ceiling(run: Run) -> str:
    """FLOP/s over the matrix-product rate that the same machine reached in the same job."""
    share = mfu_row(run).share_of_ceiling
    if share is not None:
        return f"{share:.1%}"
    if run.metrics is None:
        return no_steady_state(run)
    return "not measured: `--ceiling-s` was 0" if run.config.ceiling_s == 0 else NO_CEILING


def command(run: Run) -> str:
    """The command of a run, without the folder for its record, which changes no result."""
    return without_folder(str(run.record["command"]))


def without_folder(command: str) -> str:
    """A command without the folder for its records, which changes no result."""
    try:
        return shlex.join(without_out(shlex.split(command)))
    except ValueError:  # a quote without its end: nobody can type this command
        return command


def size(run: Run) -> str:
    """The size, and whether the shape is another than this size has; dropout is no shape."""
    model, named = run.config.model, _sizes(run.config.recipe).get(run.config.size)
    is_changed = named is not None and replace(named, dropout=model.dropout) != model
    return f"{escaped(run.config.size)}{', its shape changed' if is_changed else ''}"


@functools.cache
def _sizes(recipe: Recipe) -> Mapping[str, ModelConfig]:
    sizes: Mapping[str, ModelConfig] = importlib.import_module(f"recipes.{recipe}").PRESET.sizes
    return sizes


def shape(model: ModelConfig) -> str:
    layers = f"{format_count(model.num_layers, 'layer')} of width {model.width:,}"
    return f"{human_count(count_parameters(model))} parameters ({layers})"


def flags(runs: Iterable[Run]) -> str:
    """What makes the figures of these runs doubtful, each reason once; empty if nothing does."""
    flags = dict.fromkeys(flag for run in runs for flag in run.record["flags"])
    above = {flag: match for flag in flags if (match := ABOVE_CEILING.fullmatch(flag))}
    others = shortened("; ".join(escaped(f) for f in flags if f not in above), LONGEST_REMARK)
    if not above:
        return others
    counted = " and with ".join(f"`{m[1]}` {float(m[2]):.2f} times" for m in above.values())
    # The products of `matmul` were all computed: other conventions may count more than that.
    is_too_low = any(match[1] == MAIN_CONVENTION for match in above.values())
    why = "the ceiling is too low" if is_too_low else "more is counted than was computed"
    return "; ".join(filter(None, [f"counted with {counted} the measured ceiling: {why}", others]))


def short_flags(runs: Iterable[Run]) -> list[str]:
    """The flags of these runs, each once, for a table with many rows: shares of the ceiling become
    one flag, such as "6n 1.10 to 1.40, palm 1.11 x ceiling", which `explain_flags` explains."""
    shares: dict[str, list[float]] = {}
    others = []
    for flag in dict.fromkeys(flag for run in runs for flag in run.record["flags"]):
        if match := ABOVE_CEILING.fullmatch(flag):
            shares.setdefault(match[1], []).append(float(match[2]))
        else:
            others.append(escaped(flag))
    spans = [f"{name} {_span(values)}" for name, values in shares.items()]
    return [f"{', '.join(spans)} {OF_CEILING}", *others] if spans else others


def flag_cell(runs: Iterable[Run]) -> str:
    """`short_flags` as one text; empty if there are none."""
    return shortened("; ".join(short_flags(runs)), LONGEST_REMARK)


def _span(values: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{end:.2f}" for end in (min(values), max(values)))
    return " to ".join(ends)


def explain_flags(rows: Iterable[Mapping[str, str]]) -> str:
    """A sentence for below a table with shortened flags; empty for rows without any."""
    is_needed = any(OF_CEILING in cell for row in rows for cell in row.values())
    return ABOUT_CEILING if is_needed else ""


def flops(config: RunConfig) -> str:
    unit = UNIT[config.recipe].removesuffix("s")
    return f"{format_si(count_flops(config)[MAIN_CONVENTION])}FLOP per {unit}"


def memory(run: Run) -> str:
    """The largest peak of any rank: of tensors, and what the system provided for them."""
    parts = ["not measured"]
    if peaks(run):
        parts = [f"{peak([run])} ({escaped(run.record['peak_bytes_kind'])})"]
    for kind in ("reserved", "resident"):
        if of_kind := peaks(run, f"peak_{kind}_bytes"):
            parts.append(f"{format_bytes(max(of_kind))} {kind}")
    ranks = len(run.record["peak_bytes"])
    return ", ".join(parts) + (f"; largest of {ranks} ranks" if ranks > 1 else "")


def peak(runs: Iterable[Run]) -> str:
    """The largest peak of all ranks and launches."""
    largest = max((peak for run in runs for peak in peaks(run)), default=None)
    return "not measured" if largest is None else format_bytes(largest)


def peaks(run: Run, field: str = "peak_bytes") -> list[int]:
    """The peaks of the ranks that measured them."""
    return [peak for peak in run.record[field] if peak is not None]


def record(run: Run) -> str:
    """A link with a short text, as names of records are long and mean nothing to a reader."""
    return link(run.name, "record")


def overview(run: Run, parity: str) -> dict[str, str]:
    """Every figure of a run that ended well, by name; `parity` is the cell on its loss parity."""
    row, (baseline_value, is_beaten) = mfu_row(run), baseline(run)
    metric, no_mfu = run.record["validation"]["metric"], f"none ({escaped(str(row.reason))})"
    return {
        "size": size(run),
        "parameters": human_count(count_parameters(run.config.model)),
        "devices": devices(run),
        "precision": run.config.parallel.precision,
        "dropout": f"{run.config.model.dropout:g}",
        "batch": batch(run),
        "steps": f"{run.num_steps:,}",
        "validation loss": f"{run.record['validation']['loss']:.4f} nats",
        "metric": f"{escaped(metric)} {format_metric(metric, run.metric_value)}",
        "trivial baseline": baseline_value,
        "baseline beaten": is_beaten,
        "speed": speed(run),
        "MFU": no_mfu if row.utilisation is None else f"{row.utilisation:.1%}",
        "of the measured ceiling": share_of_ceiling(run),
        "flags": flags([run]) or "none",
        "loss parity": parity,
        "FLOPs": f"{format_si(row.flops_per_unit)}FLOP per {run.unit} (`{MAIN_CONVENTION}`)",
        "peak memory": memory(run),
        "record": record(run),
    }


def pooled_speed(point: MeasuredPoint) -> str:
    rate = point.rate
    return _rate_with_ends(rate.value, f"{point.runs[0].unit}s", rate.low, rate.high)


def launches(point: MeasuredPoint) -> str:
    """The number of launches, and of several the range of their speeds."""
    rates = sorted(run.units_per_s or 0.0 for run in point.runs)
    if len(rates) == 1:
        return "1"
    return f"{len(rates)}: {_plain_rate(rates[0])} to {_plain_rate(rates[-1])}"


def pooled_shares(point: MeasuredPoint) -> tuple[str, str]:
    """MFU and share of the ceiling, medians of the launches; empty unless all have it."""
    rows = [mfu_row(run) for run in point.runs]
    mfu = [row.utilisation for row in rows if row.utilisation is not None]
    of_ceiling = [row.share_of_ceiling for row in rows if row.share_of_ceiling is not None]
    return (
        f"{median(mfu):.1%}" if len(mfu) == len(rows) else "",
        f"{median(of_ceiling):.1%}" if len(of_ceiling) == len(rows) else "",
    )


def estimate(estimate: Estimate, form: str) -> str:
    """An estimate with its interval if it has one; the reason for none stands under the table."""
    value = form.format(estimate.value)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({form.format(estimate.low)} to {form.format(estimate.high)})"


def ratio(ratio: Estimate, digits: int) -> str:
    """A ratio with its interval, whose ends get the digits that distinguish them from 1: an
    interval that contains 1 is a tie."""
    ends = [end for end in (ratio.low, ratio.high) if end is not None and end != 1]
    while digits < MOST_DIGITS and any(round(end, digits) == 1 for end in ends):
        digits += 1
    return estimate(ratio, f"{{:.{digits}f}}")


def describe_hardware(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Returns the machines of all ranks, equal ones once."""
    hosts = len({host.get("hostname") for host in ranks})
    machines = dict.fromkeys(_describe_host(*map(host.get, DESCRIBED)) for host in ranks)
    number = format_count(hosts, "machine")
    return f"{format_count(len(ranks), 'rank')} on {number}: {'; '.join(machines)}"


@functools.lru_cache(maxsize=1024)  # thousands of records come from a few hosts
def _describe_host(*described: Any) -> str:
    device, cpu, cores, memory, system, machine, device_memory, threads = described
    parts = [
        cpu or "processor unknown",
        f"{cores} cores" if cores else "number of cores unknown",
        f"{format_bytes(memory)} memory" if memory else "memory unknown",
        " ".join(filter(None, (system, machine))) or "system unknown",
    ]
    if device != "cpu":
        size = format_bytes(device_memory) if device_memory else "memory unknown"
        parts.insert(0, f"{device}, {size}")
    elif threads:
        parts.append(f"{format_count(threads, 'thread')} per rank")
    return ", ".join(parts)


def describe_commit(code: Mapping[str, Any]) -> str:
    """Returns the commit that ran, and whether it was changed."""
    commit, is_dirty = code["commit"], code["is_dirty"]
    if commit is None:
        return "unknown: the code ran outside a git checkout"
    state = {True: "with uncommitted changes", False: "clean", None: "whether changed is unknown"}
    return f"{commit[:12]}, {state[is_dirty]}"


def describe_versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def without_paths(text: str, ranks: Sequence[Any]) -> str:
    """Removes the host names of these ranks, and of absolute paths all but the last part."""
    hosts = {str(host.get("hostname") or "") for host in ranks if isinstance(host, Mapping)}
    for name in sorted(hosts):
        if name and name in text:
            text = re.sub(rf"\b{re.escape(name)}\b", "(host)", text)
    if "/" not in text:
        return text
    return re.sub(r"(?<![\w.:/~])/(?:[^\s/:'\"]+/)+", "…/", text)
