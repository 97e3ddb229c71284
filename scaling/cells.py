"""Cells of the report: a run in, a few words or figures out; a blank says why."""

from pathlib import PurePosixPath

from scaling.markdown import count, escaped, gib, link, si
from scaling.store import Run
from unitransformer.config import Recipe
from unitransformer.flops import count_flops
from unitransformer.tasks import metric_in_words, rate_in_words

TITLES: dict[Recipe, str] = {"bert": "BERT", "gpt": "GPT", "vit": "ViT"}
CONVENTION = "matmul"  # the one of the overview


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
    parts = f"{config.batch_size:,} a device"
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
        return "blank: the record holds none, as for synthetic data"
    if baseline["loss"] is not None:
        return f"{escaped(baseline['name'])}, {baseline['loss']:.4f} nats"
    if baseline["accuracy"] is not None:
        return f"{escaped(baseline['name'])}, {baseline['accuracy']:.2%}"
    return f"{escaped(baseline['name'])}; blank: the record holds no figure of it"


def verdict(run: Run) -> str:
    validation = run.record["validation"]
    baseline = validation["baseline"] or {"loss": None, "accuracy": None}
    if baseline["loss"] is not None:
        ahead, unit = baseline["loss"] - validation["loss"], "nats"
    elif baseline["accuracy"] is not None:
        ahead, unit = 100 * (validation["value"] - baseline["accuracy"]), "percentage points"
    else:
        return "blank: there is none to compare with"
    return f"yes, by {ahead:.2f} {unit}" if ahead > 0 else f"**no**, {-ahead:.2f} {unit} short"


def speed(run: Run) -> str:
    if run.units_per_s is None:
        return too_short(run)
    return rate_in_words(run.units_per_s, f"{run.unit}s")


def too_short(run: Run) -> str:
    reason = run.record.get("steady_reason")  # records of the first kind hold none
    if isinstance(reason, str):
        return f"blank, no steady state: {escaped(reason)}"
    steps = run.num_steps - run.record["launches"][-1]
    return f"blank: {count(steps, 'step')} are too few to find a steady state"


def overview_flops(run: Run) -> str:
    return f"{si(count_flops(run.config)[CONVENTION])}FLOP per {run.unit} (`{CONVENTION}`)"


def memory(run: Run) -> str:
    peaks = run.record["peak_bytes"]
    ranks = "" if len(peaks) == 1 else f", largest of {len(peaks)} ranks"
    return f"{gib(max(peaks))} ({escaped(run.record['peak_bytes_kind'])}{ranks})"


def record(run: Run) -> str:
    return link(run.name, PurePosixPath(run.name).name)
