"""Cells of the report: a run in, a few words or figures out; a blank says why."""

from collections.abc import Iterable

from scaling.markdown import escaped, link, shortened
from scaling.store.run import Run
from unitransformer.config import Recipe, RunConfig
from unitransformer.costs.flops import MAIN_CONVENTION, count_flops
from unitransformer.costs.mfu import MfuRow
from unitransformer.record.units import UNIT, gib, metric_in_words, rate_in_words, si

TITLES: dict[Recipe, str] = {"bert": "BERT", "gpt": "GPT", "vit": "ViT"}
LONGEST_REMARK = 160  # letters in a table; the record has all of them


def label(run: Run) -> str:
    return f"{TITLES[run.config.recipe]} {run.config.size}"


def plot_name(run: Run) -> str:
    return f"{run.config.recipe}-loss.svg"


def devices(run: Run) -> str:
    parallel = run.config.parallel
    nodes = f"{parallel.num_nodes} nodes x " if parallel.num_nodes > 1 else ""
    return f"{nodes}{parallel.devices} x {parallel.accelerator}, strategy {parallel.strategy}"


def batch(run: Run) -> str:
    config = run.config
    parts = f"{config.batch_size:,} per device"
    if config.accumulate > 1:
        parts += f" x {config.accumulate} micro-batches"
    if config.parallel.world_size > 1:
        parts += f" x {config.parallel.world_size} devices"
    whole = f"{config.global_batch_size:,} = " if " x " in parts else ""
    return f"{whole}{parts}"


def metric(run: Run) -> str:
    metric, value = run.record["validation"]["metric"], run.metric_value
    shown = metric_in_words(metric, value)
    return f"{escaped(metric)} {shown}"


def baseline(run: Run) -> str:
    baseline = run.record["validation"]["baseline"]
    if baseline is None:
        return "none recorded, as for synthetic data"
    if baseline["loss"] is not None:
        return f"{escaped(baseline['name'])}, {baseline['loss']:.4f} nats"
    if baseline["accuracy"] is not None:
        return f"{escaped(baseline['name'])}, {baseline['accuracy']:.2%}"
    return f"{escaped(baseline['name'])}, whose value is not recorded"


def verdict(run: Run) -> str:
    validation = run.record["validation"]
    baseline = validation["baseline"] or {"loss": None, "accuracy": None}
    if baseline["loss"] is not None:
        ahead, unit = baseline["loss"] - validation["loss"], "nats"
    elif baseline["accuracy"] is not None:
        ahead, unit = 100 * (validation["value"] - baseline["accuracy"]), "percentage points"
    else:
        return "no baseline to compare with"
    return f"yes, by {ahead:.2f} {unit}" if ahead > 0 else f"**no**, {-ahead:.2f} {unit} short"


def speed(run: Run) -> str:
    """At the median steady step, with its interval."""
    readout = run.metrics
    if readout is None:
        return too_short(run)
    told = rate_in_words(readout.units_per_s, f"{run.unit}s")
    if readout.low_units_per_s is None or readout.high_units_per_s is None:
        return f"{told}; no interval: {escaped(str(readout.step.reason))}"
    ends = (rate_in_words(rate, "") for rate in (readout.low_units_per_s, readout.high_units_per_s))
    return f"{told} ({' to '.join(end.removesuffix(' /s') for end in ends)})"


def too_short(run: Run) -> str:
    return f"no steady state: {escaped(str(run.record['no_steady_state_reason']))}"


def utilisation(run: Run) -> str:
    """MFU of the convention of the overview."""
    row = passport_row(run)
    if row.utilisation is None:
        return f"none: {escaped(str(row.reason))}"
    return f"{row.utilisation:.1%}"


def share_of_ceiling(run: Run) -> str:
    """What this machine itself reached in this job is its denominator."""
    row = passport_row(run)
    if row.share_of_ceiling is not None:
        return f"{row.share_of_ceiling:.1%}"
    return too_short(run) if run.metrics is None else "no ceiling was measured in its dtype"


def passport_row(run: Run) -> MfuRow:
    """Of the convention of the overview."""
    return next(row for row in run.mfu if row.convention == MAIN_CONVENTION)


def size(run: Run) -> str:
    """Its name, and whether single fields of the shape were changed."""
    words = str(run.record["command"]).split()
    changed = [word for word in words if word.startswith("--model.")]
    return f"{escaped(run.config.size)}{', its shape changed' * bool(changed)}"


def flags(run: Run) -> str:
    """What makes the figures doubtful, in words."""
    return shortened("; ".join(map(escaped, run.record["flags"])), LONGEST_REMARK) or "none"


def flops(config: RunConfig) -> str:
    unit = UNIT[config.recipe].removesuffix("s")
    return f"{si(count_flops(config)[MAIN_CONVENTION])}FLOP per {unit}"


def overview_flops(run: Run) -> str:
    return f"{si(passport_row(run).flops_per_unit)}FLOP per {run.unit} (`{MAIN_CONVENTION}`)"


def memory(run: Run) -> str:
    """The largest peak of any rank: of tensors, and what was taken from the system for them."""
    record = run.record
    peaks = [peak for peak in record["peak_bytes"] if peak is not None]
    told = "not measured"
    if peaks:
        told = f"{gib(max(peaks))} ({escaped(record['peak_bytes_kind'])})"
    for words in ("reserved", "resident"):
        beside = [peak for peak in record[f"peak_{words}_bytes"] if peak is not None]
        told += f", {gib(max(beside))} {words}" if beside else ""
    ranks = len(record["peak_bytes"])
    return told if ranks == 1 else f"{told}; largest of {ranks} ranks"


def peak(runs: Iterable[Run]) -> str:
    """The largest of all ranks and launches."""
    peaks = [peak for run in runs for peak in run.record["peak_bytes"] if peak is not None]
    return gib(max(peaks)) if peaks else "not measured"


def record(run: Run) -> str:
    """A link with a short text: names of records are long and tell a reader nothing."""
    return link(run.name, "record")
