"""The report: a store of runs goes in; the Markdown of RESULTS.md and its plots come out.

Pure: equal records give equal bytes. What cannot be told is blank with the reason in words, and
every figure names the record it comes from. Derived figures are computed again from raw samples.
"""

import html
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, get_args
from urllib.parse import quote

from tabulate import tabulate

from scaling.store import Run, Store, find_contradictions, find_recounts
from unitransformer.config import ModelConfig, Recipe, RunConfig
from unitransformer.flops import count_flops, count_looked_at, count_parameters
from unitransformer.summary import human_count

TITLES: dict[Recipe, str] = {"bert": "BERT", "gpt": "GPT", "vit": "ViT"}
CONVENTION = "matmul"  # the one of the overview
CONVENTIONS = {
    "6n": "6 x parameters (Kaplan et al. 2020)",
    "palm": "6 x parameters and attention in full (Chowdhery et al. 2022)",
    "matmul": "the matrix multiplications that are done, attention in full",
    "matmul_causal": "as `matmul`, with the half of attention that a causal mask leaves",
}
LOG_LINES = 12
LONG_SUMMARY = 50  # lines from which a summary is folded
LONGEST_MESSAGE = 300  # letters of an error in a table; the record has all of them


def render_report(store: Store, *, command: str, plots: str) -> str:
    """The text of RESULTS.md.

    Args:
        command: what writes this text again, in words of the folder it is in.
        plots: the way from the text to the folder with the files of `draw_plots`.
    """
    recipes = _runs_of_recipes(store)
    mains = {recipe: runs[0] for recipe, runs in recipes.items()}
    blocks = [
        "# Results",
        _opening(store, command),
        _contradictions(store),
        _recounts(store),
        "## Conditions",
        _conditions([run for runs in recipes.values() for run in runs]),
        "## Overview",
        _overview(mains),
        *(block for runs in recipes.values() for block in _recipe_section(runs, plots)),
        *_failures(store),
        *_left_out(store),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def draw_plots(store: Store) -> dict[str, bytes]:
    """SVG files by name: the loss curve of each recipe's longest run."""
    from unitransformer.plots import figure_bytes, loss_figure

    drawn = {}
    for runs in _runs_of_recipes(store).values():
        run = runs[0]
        validation = run.record["validation"]
        baseline = validation["baseline"]
        to_beat = None
        if baseline is not None and baseline["loss"] is not None:
            to_beat = (baseline["name"], baseline["loss"])
        figure = loss_figure(
            run.record["loss"], validation["history"], title=_label(run), baseline=to_beat
        )
        drawn[_plot_name(run)] = figure_bytes(figure, "svg")
    return drawn


def _runs_of_recipes(store: Store) -> dict[Recipe, list[Run]]:
    """Runs that ended well: recipes in their order, in each the run with most steps first, of
    equally long ones the newest."""
    by_name = sorted((run for run in store.runs if run.is_ok), key=lambda run: run.name)
    newest = sorted(by_name, key=lambda run: str(run.record.get("started_at")), reverse=True)
    longest = sorted(newest, key=lambda run: -run.num_steps)
    grouped = {
        recipe: [run for run in longest if run.config.recipe == recipe]
        for recipe in get_args(Recipe)
    }
    return {recipe: runs for recipe, runs in grouped.items() if runs}


# ---------------------------------------------------------------------------------- the whole


def _opening(store: Store, command: str) -> str:
    return (
        f"What {_count(len(store.runs), 'run')} of the suite measured: one section for each "
        "recipe, with the record behind every figure. This file is generated and never edited; "
        "rates and counts are computed again from raw samples each time it is written, in its own "
        f"folder, by\n\n{_code_block(command, 'sh')}"
    )


def _contradictions(store: Store) -> str:
    return _alert(
        "WARNING",
        "Fields of these records do not follow from their own samples and config. The tables show "
        "what does follow.",
        store,
        find_contradictions,
    )


def _recounts(store: Store) -> str:
    return _alert(
        "NOTE",
        "The code counts FLOPs otherwise than when these records were written. The tables show "
        "today's counts.",
        store,
        find_recounts,
    )


def _alert(kind: str, words: str, store: Store, find: Callable[[Run], list[str]]) -> str:
    """A box with what `find` finds, a line for each record; nothing if it finds nothing."""
    found = {run.name: find(run) for run in store.runs if run.is_ok}
    lines = [f"> - {_link(name)}: {_text('; '.join(all_))}" for name, all_ in found.items() if all_]
    return "\n".join([f"> [!{kind}]", f"> {words}", ">", *lines]) if lines else ""


def _conditions(runs: Sequence[Run]) -> str:
    if not runs:
        return "None to tell: no run ended well."
    rows: dict[str, Callable[[Run], str]] = {
        "hardware": _hardware,
        "versions": lambda run: ", ".join(f"{k} {v}" for k, v in run.record["versions"].items()),
        "commit": _commit,
        "data": _data,
    }
    return _table(("condition", "value"), [(name, _distinct(runs, rows[name])) for name in rows])


def _distinct(runs: Sequence[Run], describe: Callable[[Run], str]) -> str:
    """The description all runs share, or each with the recipes it is of; a cell."""
    recipes: dict[str, list[str]] = {}
    for run in runs:
        titles = recipes.setdefault(_text(describe(run)), [])
        if TITLES[run.config.recipe] not in titles:
            titles.append(TITLES[run.config.recipe])
    if len(recipes) == 1:
        return next(iter(recipes))
    return "<br>".join(f"{', '.join(titles)}: {value}" for value, titles in recipes.items())


def _hardware(run: Run) -> str:
    ranks = run.record["hardware"]
    hosts = len({host.get("hostname") for host in ranks})
    described = dict.fromkeys(map(_host, ranks))
    return f"{_count(len(ranks), 'rank')} on {_count(hosts, 'machine')}: {'; '.join(described)}"


def _host(host: Mapping[str, Any]) -> str:
    cores, memory = host.get("cpu_cores"), host.get("memory_bytes")
    parts = [
        host.get("cpu") or "processor not told by the system",
        f"{cores} cores" if cores else "cores not told",
        f"{_gib(memory)} memory" if memory else "memory not told",
        " ".join(filter(None, (host.get("system"), host.get("machine")))) or "system not told",
    ]
    if host["device"] != "cpu":
        on_device = host.get("device_memory_bytes")
        parts.insert(0, f"{host['device']}, {_gib(on_device) if on_device else 'memory not told'}")
    elif host.get("threads"):
        parts.append(f"{_count(host['threads'], 'thread')} a rank")
    return ", ".join(parts)


def _commit(run: Run) -> str:
    commit, is_dirty = run.record["code"]["commit"], run.record["code"]["is_dirty"]
    if commit is None:
        return "not told: the code ran outside a git checkout"
    state = {True: "with changes not committed", False: "clean", None: "changes not told"}
    return f"{commit[:12]}, {state[is_dirty]}"


def _data(run: Run) -> str:
    data = run.record["data"]
    proof = f"sha256 {data['sha256']}" if data["sha256"] else "no sha256: it has no files"
    return f"{_without_places(data['description'], run)}; {proof}"


def _overview(mains: Mapping[Recipe, Run]) -> str:
    """Recipes side by side: one column each."""
    if not mains:
        return "Nothing to compare: no run ended well."
    columns = [TITLES[recipe] for recipe in mains]
    body = [(name, *map(describe, mains.values())) for name, describe in _described().items()]
    return _table(("recipe", *columns), body)


def _described() -> dict[str, Callable[[Run], str]]:
    """What is told of every run that ended well, as cells."""
    return {
        "size": lambda run: _text(run.config.size),
        "parameters": lambda run: human_count(count_parameters(run.config.model)),
        "devices": _devices,
        "precision": lambda run: run.config.parallel.precision,
        "batch": _batch,
        "steps": lambda run: f"{run.num_steps:,}",
        "validation loss": lambda run: f"{run.record['validation']['loss']:.4f} nats",
        "metric": _metric,
        "trivial baseline": _baseline,
        "baseline beaten": _verdict,
        "speed": _speed,
        "FLOPs": _overview_flops,
        "peak memory": _memory,
        "record": _record,
    }


def _failures(store: Store) -> list[str]:
    failed = [run for run in store.runs if not run.is_ok]
    if not failed:
        return []
    headers = ("recipe", "devices", "precision", "batch", "steps", "status", "error", "record")
    rows = [
        (
            _text(_label(run)),
            _devices(run),
            run.config.parallel.precision,
            _batch(run),
            f"{run.num_steps:,} of {run.config.max_steps:,}",
            run.record["status"],
            _error(run),
            _record(run),
        )
        for run in failed
    ]
    return ["## Runs that did not end well", _table(headers, rows)]


def _error(run: Run) -> str:
    error = run.record["error"]
    if error is None:
        return "not told: the record holds none"
    message = _without_places(str(error.get("message") or "no message"), run)
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]}…"
    return _text(f"{error.get('type') or 'error of a type not told'}: {message}")


def _left_out(store: Store) -> list[str]:
    """Damaged and double records; files that are something else are no business of a reader."""
    rows = [
        (_text(file.name), file.kind, _text(file.reason))
        for file in store.left_out
        if file.kind != "foreign"
    ]
    return ["## Files left out", _table(("file", "kind", "reason"), rows)] if rows else []


# ---------------------------------------------------------------------------------- one recipe


def _recipe_section(runs: Sequence[Run], plots: str) -> list[str]:
    run, others = runs[0], runs[1:]
    record = run.record
    title = TITLES[run.config.recipe]
    plot = quote(str(PurePosixPath(plots, _plot_name(run))))
    return [
        f"## {title}",
        f"{_text(_label(run))}, {_count(run.num_steps, 'step')}; record {_link(run.name)}, made by",
        _code_block(record["command"], "sh"),
        "### Architecture",
        _code_block(draw_architecture(run.config), "mermaid"),
        "### Parameters",
        _summary(record["summary"]),
        "### Training",
        _code_block("\n".join(record["log"][-LOG_LINES:]) or "no log lines in the record"),
        f"![Loss of {title} over the optimizer steps]({plot})",
        "### Speed, work and memory",
        _figures(run),
        *_other_runs(others),
    ]


def _summary(summary: str) -> str:
    block = _code_block(summary)
    rows = len(summary.splitlines())
    if rows < LONG_SUMMARY:
        return block
    return f"<details>\n<summary>Table of {rows} lines</summary>\n\n{block}\n\n</details>"


def _figures(run: Run) -> str:
    rows = [
        ("steady state", _steady(run)),
        ("median steady step", _median_step(run)),
        ("speed", _explained_speed(run)),
        *(
            (f"FLOPs per {run.unit}, `{name}`", f"{count:,.0f}: {CONVENTIONS[name]}")
            for name, count in count_flops(run.config).items()
        ),
        ("peak memory", _memory(run)),
        ("spread over", _devices(run)),
        ("batch", _batch(run)),
        ("precision", f"{run.config.parallel.precision}, compile {run.config.parallel.compile}"),
        ("seed", str(run.config.seed)),
        ("started", _text(str(run.record.get("started_at") or "not told by the record"))),
    ]
    return _table(("figure", "value"), rows)


def _steady(run: Run) -> str:
    if not run.steady_s:
        return _too_short(run)
    first = run.record["steady_from"] + 1
    launches = len(run.record["launches"])
    after = f", in the last of {launches} launches" if launches > 1 else ""
    return (
        f"steps {first} to {run.num_steps}, {_count(len(run.steady_s), 'step')}{after}: "
        f"{_text(run.record['steady_method'])}"
    )


def _median_step(run: Run) -> str:
    if run.median_step_s is None:
        return _too_short(run)
    told = f"{_ms(run.median_step_s)}"
    if len(run.steady_s) < 2:
        return f"{told}; no spread, it is a single step"
    low, _, high = statistics.quantiles(run.steady_s, n=4, method="inclusive")
    return f"{told}; the middle half of the steps took {_ms(low)} to {_ms(high)}"


def _explained_speed(run: Run) -> str:
    if run.units_per_s is None:
        return _too_short(run)
    return f"{_speed(run)}: {_count(run.units_per_step, run.unit)} a step, over that median"


def _other_runs(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return []
    columns = _described()
    body = [[describe(run) for describe in columns.values()] for run in runs]
    return ["### Other runs", _table(tuple(columns), body)]


# ---------------------------------------------------------------------------------- cells


def _label(run: Run) -> str:
    return f"{TITLES[run.config.recipe]} {run.config.size}"


def _plot_name(run: Run) -> str:
    return f"{run.config.recipe}-loss.svg"


def _devices(run: Run) -> str:
    parallel = run.config.parallel
    nodes = f"{parallel.num_nodes} nodes x " if parallel.num_nodes > 1 else ""
    return f"{nodes}{parallel.devices} x {parallel.accelerator}, strategy {parallel.strategy}"


def _batch(run: Run) -> str:
    config = run.config
    parts = f"{config.batch_size:,} a device"
    if config.accumulate > 1:
        parts += f" x {config.accumulate} micro-batches"
    if config.parallel.world_size > 1:
        parts += f" x {config.parallel.world_size} devices"
    whole = f"{config.global_batch_size:,} = " if " x " in parts else ""
    return f"{whole}{parts}"


def _metric(run: Run) -> str:
    metric, value = run.record["validation"]["metric"], run.metric_value
    shown = f"{value:,.1f}" if metric == "perplexity" else f"{value:.2%}"
    return f"{_text(metric)} {shown}"


def _baseline(run: Run) -> str:
    baseline = run.record["validation"]["baseline"]
    if baseline is None:
        return "blank: the record holds none, as for synthetic data"
    if baseline["loss"] is not None:
        return f"{_text(baseline['name'])}, {baseline['loss']:.4f} nats"
    if baseline["accuracy"] is not None:
        return f"{_text(baseline['name'])}, {baseline['accuracy']:.2%}"
    return f"{_text(baseline['name'])}; blank: the record holds no figure of it"


def _verdict(run: Run) -> str:
    validation = run.record["validation"]
    baseline = validation["baseline"] or {"loss": None, "accuracy": None}
    if baseline["loss"] is not None:
        ahead, unit = baseline["loss"] - validation["loss"], "nats"
    elif baseline["accuracy"] is not None:
        ahead, unit = 100 * (validation["value"] - baseline["accuracy"]), "percentage points"
    else:
        return "blank: there is none to compare with"
    return f"yes, by {ahead:.2f} {unit}" if ahead > 0 else f"**no**, {-ahead:.2f} {unit} short"


def _speed(run: Run) -> str:
    if run.units_per_s is None:
        return _too_short(run)
    digits = 0 if run.units_per_s >= 100 else 2
    return f"{run.units_per_s:,.{digits}f} {run.unit}s/s"


def _too_short(run: Run) -> str:
    steps = run.num_steps - run.record["launches"][-1]
    return f"blank: {_count(steps, 'step')} are too few to find a steady state"


def _overview_flops(run: Run) -> str:
    return f"{_si(count_flops(run.config)[CONVENTION])}FLOP per {run.unit} (`{CONVENTION}`)"


def _memory(run: Run) -> str:
    peaks = run.record["peak_bytes"]
    ranks = "" if len(peaks) == 1 else f", largest of {len(peaks)} ranks"
    return f"{_gib(max(peaks))} ({_text(run.record['peak_bytes_kind'])}{ranks})"


def _record(run: Run) -> str:
    return _link(run.name, PurePosixPath(run.name).name)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"


def _si(number: float) -> str:
    """Three digits and the prefix of the unit that follows: "6.01 M"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g} {prefixes[0]}"


def _count(number: int, thing: str, things: str = "") -> str:
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


# ---------------------------------------------------------------------------------- drawing


def draw_architecture(config: RunConfig) -> str:
    """A Mermaid flowchart of what `config` builds and what its loss looks at.

    No label begins with + or -: Mermaid would take it for a list and refuse.
    """
    model, asked = config.model, count_looked_at(config)
    length = _count(config.sequence_length, "position")
    layers = (
        f"{_count(model.num_layers, 'layer')}{', one after the other' * (model.num_layers > 1)}"
    )
    norm = f'final_norm["LayerNorm {model.width:,}"] --> ' if model.final_norm else ""
    return "\n".join(
        [
            "flowchart TB",
            *_input_nodes(config),
            f'    positions["sinusoids of {length} added{_dropout(model)}"]',
            "    embedding --> positions",
            f'    subgraph layers["{layers}"]',
            *(f"        {line}" for line in _layer_nodes(model)),
            "    end",
            "    positions --> norm1 & add1",
            f'    add2 -- "{_looked_at(config, asked)}" --> {norm}head',
            f'    head["{_head(model)}"] --> loss(["{_loss(config, asked)}"])',
        ]
    )


def _input_nodes(config: RunConfig) -> list[str]:
    model, length = config.model, config.sequence_length
    if model.image_size is None or model.patch_size is None:
        words = f"{model.num_classes:,} words"
        hidden = f", {config.data.mask_fraction:.0%} chosen to be found"
        chosen = hidden if config.recipe == "bert" else ""
        return [
            f'    input(["{_count(length, "token")}{chosen}"]) --> embedding',
            f'    embedding["embedding: {words} x {model.width:,}<br/>times √{model.width:,}"]',
        ]
    size, patch = model.image_size, model.patch_size
    pixels = model.num_channels * patch**2
    return [
        f'    input(["picture, {model.num_channels} x {size} x {size}"]) --> patches',
        f'    patches["{_count(length - 1, "patch", "patches")} of {patch} x {patch} pixels<br/>'
        f'linear {pixels:,} → {model.width:,}"] --> embedding',
        f'    embedding["class token in front: {_count(length, "position")} x {model.width:,}"]',
    ]


def _layer_nodes(model: ModelConfig) -> list[str]:
    sees = "causal: sees itself and what came before" if model.causal else "sees all positions"
    heads = f"{_count(model.num_heads, 'head')} x {model.head_width:,}"
    hidden = f"{model.width:,} → {model.feedforward_width:,} → {model.width:,}"
    return [
        f'norm1["LayerNorm {model.width:,}"] --> attention',
        f'attention["attention: {heads}<br/>{sees}"] --> add1(("⊕"))',
        "add1 --> norm2 & add2",
        f'norm2["LayerNorm {model.width:,}"] --> feedforward',
        f'feedforward["feed-forward: {hidden}<br/>{model.activation}{_dropout(model)}"]'
        ' --> add2(("⊕"))',
    ]


def _dropout(model: ModelConfig) -> str:
    return f", dropout {model.dropout:g}" if model.dropout else ""


def _head(model: ModelConfig) -> str:
    bias = "with bias" if model.head_bias else "no bias"
    tied = ", the word vectors again" if model.tied_head else ""
    return f"head: linear {model.width:,} → {model.num_classes:,}<br/>{bias}{tied}"


def _looked_at(config: RunConfig, asked: int) -> str:
    match config.recipe:
        case "bert":
            return f"{asked} chosen of {config.sequence_length} positions"
        case "gpt":
            return f"all {_count(asked, 'position')}"
        case "vit":
            return "the class token"


def _loss(config: RunConfig, asked: int) -> str:
    match config.recipe:
        case "bert":
            return f"cross entropy of {_count(asked, 'chosen word')}"
        case "gpt":
            return f"cross entropy of the next word, {_count(asked, 'time')} a sample"
        case "vit":
            return f"cross entropy of the label, one of {config.model.num_classes:,}"


# ---------------------------------------------------------------------------------- Markdown


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return tabulate(list(rows), headers=headers, tablefmt="github", disable_numparse=True)


def _text(text: str) -> str:
    """`text` as it is, in a cell or a line: no markup, no formula, no end of the cell."""
    plain = html.escape(text.strip(), quote=False)
    escaped = re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", plain)
    return "<br>".join(escaped.splitlines())


def _code_block(text: str, language: str = "") -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _link(target: str, words: str = "") -> str:
    return f"[{_text(words or target)}]({quote(target)})"


def _without_places(text: str, run: Run) -> str:
    """Hosts and absolute paths are nobody's business: only the last name of a path stays."""
    for host in run.record["hardware"]:
        if isinstance(host, Mapping) and host.get("hostname"):
            text = re.sub(rf"\b{re.escape(str(host['hostname']))}\b", "(host)", text)
    return re.sub(r"(?<![\w.:/~])/(?:[^\s/:'\"]+/)+", "…/", text)
