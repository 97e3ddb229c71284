"""The report: a store of runs goes in; the Markdown of RESULTS.md and its plots come out.

Pure: equal records give equal bytes. What cannot be told is blank with the reason in words, and
every figure names the record it comes from. Derived figures are computed again from raw samples.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import get_args
from urllib.parse import quote

from scaling import cells, certificates
from scaling.architecture import draw_architecture
from scaling.certificates import find_other_bounds
from scaling.conditions import (
    describe_commit,
    describe_hardware,
    describe_versions,
    without_places,
)
from scaling.markdown import code_block, count, escaped, link, ms, table
from scaling.parity_section import parity_cell, parity_section
from scaling.store import Run, Store, find_contradictions, find_recounts
from unitransformer.config import Recipe
from unitransformer.flops import count_parameters
from unitransformer.passport import Row
from unitransformer.readout import interval_in_words
from unitransformer.summary import human_count
from unitransformer.tasks import rate_in_words, si

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
        _overview(mains, _described(store)),
        *(
            block
            for runs in recipes.values()
            for block in _recipe_section(runs, plots, _described(store))
        ),
        *parity_section(store.certificates),
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
            run.record["loss"], validation["history"], title=cells.label(run), baseline=to_beat
        )
        drawn[cells.plot_name(run)] = figure_bytes(figure, "svg")
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


def _opening(store: Store, command: str) -> str:
    proofs = count(len(store.certificates), "certificate")
    also = f", and what {proofs} of loss parity prove" if store.certificates else ""
    return (
        f"What {count(len(store.runs), 'run')} of the suite measured: one section for each "
        f"recipe, with the record behind every figure{also}. This file is generated and never "
        "edited; rates and counts are computed again from raw samples each time it is written, in "
        f"its own folder, by\n\n{code_block(command, 'sh')}"
    )


def _contradictions(store: Store) -> str:
    return _alert(
        "WARNING",
        "Fields of these files do not follow from their own samples and config. The tables show "
        "what does follow.",
        [(run.name, find_contradictions(run)) for run in store.runs if run.is_ok]
        + [(c.name, certificates.find_contradictions(c)) for c in store.certificates],
    )


def _recounts(store: Store) -> str:
    counts = [(run.name, find_recounts(run)) for run in store.runs if run.is_ok]
    bounds = [(c.name, find_other_bounds(c)) for c in store.certificates]
    return "\n\n".join(
        filter(
            None,
            [
                _alert(
                    "NOTE",
                    "The code counts FLOPs otherwise than when these records were written. The "
                    "tables show today's counts.",
                    counts,
                ),
                _alert(
                    "NOTE",
                    "The code holds loss parity to other bounds than when these certificates were "
                    "written. The tables judge by today's.",
                    bounds,
                ),
            ],
        )
    )


def _alert(kind: str, words: str, found: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A box with what was found, a line for each file; nothing if nothing was."""
    lines = [f"> - {link(name)}: {escaped('; '.join(all_))}" for name, all_ in found if all_]
    return "\n".join([f"> [!{kind}]", f"> {words}", ">", *lines]) if lines else ""


def _conditions(runs: Sequence[Run]) -> str:
    if not runs:
        return "None to tell: no run ended well."
    rows: dict[str, Callable[[Run], str]] = {
        "hardware": lambda run: describe_hardware(run.record["hardware"]),
        "versions": lambda run: describe_versions(run.record["versions"]),
        "commit": lambda run: describe_commit(run.record["code"]),
        "data": _data,
    }
    return table(("condition", "value"), [(name, _distinct(runs, rows[name])) for name in rows])


def _distinct(runs: Sequence[Run], describe: Callable[[Run], str]) -> str:
    """The description all runs share, or each with the recipes it is of; a cell."""
    recipes: dict[str, list[str]] = {}
    for run in runs:
        titles = recipes.setdefault(escaped(describe(run)), [])
        if cells.TITLES[run.config.recipe] not in titles:
            titles.append(cells.TITLES[run.config.recipe])
    if len(recipes) == 1:
        return next(iter(recipes))
    return "<br>".join(f"{', '.join(titles)}: {value}" for value, titles in recipes.items())


def _data(run: Run) -> str:
    data = run.record["data"]
    proof = f"sha256 {data['sha256']}" if data["sha256"] else "no sha256: it has no files"
    return f"{without_places(data['description'], run.record['hardware'])}; {proof}"


Describe = Mapping[str, Callable[[Run], str]]


def _overview(mains: Mapping[Recipe, Run], described: Describe) -> str:
    """Recipes side by side: one column each."""
    if not mains:
        return "Nothing to compare: no run ended well."
    columns = [cells.TITLES[recipe] for recipe in mains]
    body = [(name, *map(describe, mains.values())) for name, describe in described.items()]
    return table(("recipe", *columns), body)


def _described(store: Store) -> Describe:
    """What is told of every run that ended well, as cells."""
    return {
        "size": lambda run: escaped(run.config.size),
        "parameters": lambda run: human_count(count_parameters(run.config.model)),
        "devices": cells.devices,
        "precision": lambda run: run.config.parallel.precision,
        "batch": cells.batch,
        "steps": lambda run: f"{run.num_steps:,}",
        "validation loss": lambda run: f"{run.record['validation']['loss']:.4f} nats",
        "metric": cells.metric,
        "trivial baseline": cells.baseline,
        "baseline beaten": cells.verdict,
        "speed": cells.speed,
        "MFU": cells.utilisation,
        "flags": cells.flags,
        "loss parity": lambda run: parity_cell(run, store.certificates),
        "FLOPs": cells.overview_flops,
        "peak memory": cells.memory,
        "record": cells.record,
    }


def _failures(store: Store) -> list[str]:
    failed = [run for run in store.runs if not run.is_ok]
    if not failed:
        return []
    headers = ("recipe", "devices", "precision", "batch", "steps", "status", "error", "record")
    rows = [
        (
            escaped(cells.label(run)),
            cells.devices(run),
            run.config.parallel.precision,
            cells.batch(run),
            f"{run.num_steps:,} of {run.config.max_steps:,}",
            run.record["status"],
            _error(run),
            cells.record(run),
        )
        for run in failed
    ]
    return ["## Runs that did not end well", table(headers, rows)]


def _error(run: Run) -> str:
    error = run.record["error"]
    if error is None:
        return "not told: the record holds none"
    message = without_places(str(error.get("message") or "no message"), run.record["hardware"])
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]}…"
    return escaped(f"{error.get('type') or 'error of a type not told'}: {message}")


def _left_out(store: Store) -> list[str]:
    """Damaged and double records; files that are something else are no business of a reader."""
    rows = [
        (escaped(file.name), file.kind, escaped(file.reason))
        for file in store.left_out
        if file.kind != "foreign"
    ]
    return ["## Files left out", table(("file", "kind", "reason"), rows)] if rows else []


def _recipe_section(runs: Sequence[Run], plots: str, described: Describe) -> list[str]:
    run, others = runs[0], runs[1:]
    record = run.record
    title = cells.TITLES[run.config.recipe]
    plot = quote(str(PurePosixPath(plots, cells.plot_name(run))))
    return [
        f"## {title}",
        f"{escaped(cells.label(run))}, {count(run.num_steps, 'step')}; record {link(run.name)}, "
        "made by",
        code_block(record["command"], "sh"),
        "### Architecture",
        code_block(draw_architecture(run.config), "mermaid"),
        "### Parameters",
        _summary(record["summary"]),
        "### Training",
        code_block("\n".join(record["log"][-LOG_LINES:]) or "no log lines in the record"),
        f"![Loss of {title} over the optimizer steps]({plot})",
        "### Speed and memory",
        _figures(run),
        "### FLOPs and MFU",
        *_passport(run),
        *_other_runs(others, described),
    ]


def _summary(summary: str) -> str:
    block = code_block(summary)
    rows = len(summary.splitlines())
    if rows < LONG_SUMMARY:
        return block
    return f"<details>\n<summary>Table of {rows} lines</summary>\n\n{block}\n\n</details>"


def _figures(run: Run) -> str:
    rows = [
        ("steady state", _steady(run)),
        ("median steady step", _median_step(run)),
        ("speed", _explained_speed(run)),
        ("mean speed", _mean_speed(run)),
        ("where the time goes", _shares(run)),
        ("ceiling of this machine, in this job", _ceiling(run)),
        ("peak memory", cells.memory(run)),
        ("compile", _compile(run)),
        ("flags", cells.flags(run)),
        ("spread over", cells.devices(run)),
        ("batch", cells.batch(run)),
        ("precision", f"{run.config.parallel.precision}, compile {run.config.parallel.compile}"),
        ("seed", str(run.config.seed)),
        ("started", escaped(str(run.record.get("started_at") or "not told by the record"))),
    ]
    return table(("figure", "value"), rows)


def _steady(run: Run) -> str:
    if run.readout is None:
        return cells.too_short(run)
    first = run.record["steady_from"] + 1
    launches = len(run.record["launches"])
    after = f", in the last of {launches} launches" if launches > 1 else ""
    left_out = [item for item in run.record["unsteady"] if item["step"] >= first]
    but = "".join(f"; without step {item['step'] + 1}: {item['reason']}" for item in left_out)
    return (
        f"steps {first} to {run.num_steps}, {count(run.readout.step.count, 'step')}{after}: "
        f"{escaped(run.record['steady_method'] + but)}"
    )


def _median_step(run: Run) -> str:
    if run.readout is None:
        return cells.too_short(run)
    step, cpu = run.readout.step, run.readout.cpu
    told = f"{ms(step.median)}, median absolute deviation {ms(step.mad)}"
    if step.low is not None and step.high is not None:
        told += f"; {ms(step.low)} to {ms(step.high)}"
    busy = f"; processor time {ms(cpu.median)}" if run.config.parallel.accelerator == "cpu" else ""
    return f"{told}{busy}; {escaped(interval_in_words(step))}"


def _explained_speed(run: Run) -> str:
    if run.readout is None:
        return cells.too_short(run)
    return f"{cells.speed(run)}: {count(run.units_per_step, run.unit)} a step, over that median"


def _mean_speed(run: Run) -> str:
    if run.readout is None:
        return cells.too_short(run)
    rate = rate_in_words(run.readout.mean_units_per_s, f"{run.unit}s")
    return f"{rate}: all {run.unit}s over all seconds of the steady steps, stalls included"


def _shares(run: Run) -> str:
    if run.readout is None:
        return cells.too_short(run)
    words = {
        "data_s": "waiting for data",
        "forward_backward_s": "forward and backward",
        "optimizer_s": "optimizer",
    }
    shares = ", ".join(f"{words[part]} {s:.1%}" for part, s in run.readout.shares.items())
    if run.config.parallel.world_size == 1:
        return shares
    return f"{shares}; communication is within, `--trace` tells it apart"


def _ceiling(run: Run) -> str:
    measured = [ceiling for ceiling in run.record["ceiling"] if ceiling is not None]
    if not measured:
        return "blank: not measured, `--ceiling-s` was 0 or the run did not end well"
    best = max(measured, key=lambda ceiling: float(ceiling["matmul_flops_per_s"]))
    ranks = "" if len(measured) == 1 else f", the best of {len(measured)} ranks at once"
    return (
        f"{si(best['matmul_flops_per_s'])}FLOP/s in {escaped(best['dtype'])} matrix products, "
        f"{si(best['copy_bytes_per_s'])}B/s copied (read and written){ranks}"
    )


def _compile(run: Run) -> str:
    ledger = run.record["compile"][0]
    if ledger["mode"] == "off":
        return "off"
    seconds = ledger["compile_s"]
    told = [
        f"{ledger['mode']}, {ledger['start'] or 'start not told'}",
        "seconds not told" if seconds is None else f"{seconds:.1f} s of compiling",
        "graphs not told" if ledger["graphs"] is None else count(ledger["graphs"], "graph"),
        count(len(ledger["graph_breaks"]), "graph break"),
        count(len(ledger["recompiles"]), "recompile"),
    ]
    places = [f"break at {item['where']}: {item['reason']}" for item in ledger["graph_breaks"]]
    places += [
        f"step {item['step']}: {item['function']}: {item['reason'] or 'reason not told'}"
        for item in ledger["recompiles"]
    ]
    return escaped("; ".join([", ".join(told), *places]))


def _passport(run: Run) -> list[str]:
    """What each way of counting says, beside the peak and the ceiling."""
    headers = (
        *("convention", f"FLOPs per {run.unit}", "FLOP/s a device", "share of the data sheet"),
        *("share of the ceiling", "what it counts"),
    )
    rows = [
        (
            f"`{row.convention}`",
            f"{row.flops_per_unit:,.0f}",
            f"{si(row.flops_per_s)}FLOP/s" if row.flops_per_s is not None else "blank",
            _utilisation(row),
            _share_of_ceiling(row),
            escaped(row.counts),
        )
        for row in run.passport
    ]
    first = run.passport[0]
    source = ""
    if first.peak_flops_per_s is not None:
        remark = f"; {first.peak_remark}" if first.peak_remark else ""
        source = (
            f"Data sheet: {si(first.peak_flops_per_s)}FLOP/s dense in {first.dtype}, "
            f"{first.peak_source}{remark}."
        )
    return [table(headers, rows), escaped(source)]


def _utilisation(row: Row) -> str:
    if row.utilisation is None:
        return f"blank: {escaped(str(row.reason))}"
    return f"{row.kind} {row.utilisation:.1%}"


def _share_of_ceiling(row: Row) -> str:
    told = "blank" if row.share_of_ceiling is None else f"{row.share_of_ceiling:.1%}"
    return f"{told}; {escaped(row.flag)}" if row.flag else told


def _other_runs(runs: Sequence[Run], described: Describe) -> list[str]:
    if not runs:
        return []
    body = [[describe(run) for describe in described.values()] for run in runs]
    return ["### Other runs", table(tuple(described), body)]
