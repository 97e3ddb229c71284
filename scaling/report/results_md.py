"""The report: a store of runs goes in; the Markdown of RESULTS.md and its plots come out.

Pure: equal records give equal bytes. What cannot be told is blank with the reason in words, and
every figure names the record it comes from. Derived figures are computed again from raw samples.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import get_args
from urllib.parse import quote

from scaling.markdown import code_block, count, escaped, link, table
from scaling.parity import certificate
from scaling.parity.certificate import find_other_bounds
from scaling.report import run_formatting
from scaling.report.environment import (
    apart,
    describe_commit,
    describe_hardware,
    describe_versions,
    without_places,
)
from scaling.report.plots import draw, plots_of
from scaling.report.sections.architecture import draw_architecture
from scaling.report.sections.failures import failures, left_out
from scaling.report.sections.parity import parity_cell, parity_section
from scaling.report.sections.scaling import scaling_blocks
from scaling.report.sections.speed import figures_table, passport_tables
from scaling.report.sections.sweep import sweep_blocks
from scaling.report.staleness import NOT_COMPARED, Today, explain, marked
from scaling.report.sweep_names import slug_of, sweep_names, sweeps_of
from scaling.store.reader import Store
from scaling.store.run import Run, find_contradictions, find_recounts
from unitransformer.config import Recipe
from unitransformer.costs.flops import count_parameters
from unitransformer.record.parameter_summary import human_count

LOG_LINES = 12
LONG_SUMMARY = 50  # lines from which a summary is folded


def render_report(store: Store, *, command: str, plots: str, today: Today = NOT_COMPARED) -> str:
    """The text of RESULTS.md.

    Args:
        command: what writes this text again, in words of the folder it is in.
        plots: the way from the text to the folder with the files of `draw_plots`.
        today: what the records are held against; what is stale is marked.
    """
    recipes = _runs_of_recipes(store)
    mains = {recipe: runs[0] for recipe, runs in recipes.items()}
    blocks = [
        "# Results",
        _opening(store, command),
        _contradictions(store),
        _recounts(store),
        "## Conditions",
        _conditions([run for runs in recipes.values() for run in runs] + _ok_cells(store)),
        explain(today),
        "## Overview",
        _overview(mains, _described(store)),
        *(
            block
            for recipe in get_args(Recipe)
            for block in _recipe_section(recipe, recipes.get(recipe, []), store, plots)
        ),
        *parity_section(store.certificates),
        *failures(store),
        *left_out(store),
    ]
    return marked("\n\n".join(block for block in blocks if block) + "\n", store, today)


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
            run.record["loss"],
            validation["history"],
            title=run_formatting.label(run),
            baseline=to_beat,
        )
        drawn[run_formatting.plot_name(run)] = figure_bytes(figure, "svg")
    names = sweep_names(store)
    for (recipe, sweep), own in sweeps_of(store).items():
        slug = slug_of(recipe, names[sweep])
        drawn |= {f"{plot.name}.svg": draw(plot) for plot in plots_of(slug, own)}
    return drawn


def _runs_of_recipes(store: Store) -> dict[Recipe, list[Run]]:
    """Runs that ended well and are no cell of a sweep, or where a recipe has none of these its
    cells: recipes in their order, in each the run with most steps first, of equally long ones the
    newest."""
    grouped = {
        recipe: _longest_first(store.single_runs, recipe) or _longest_first(store.runs, recipe)
        for recipe in get_args(Recipe)
    }
    return {recipe: runs for recipe, runs in grouped.items() if runs}


def _longest_first(runs: Sequence[Run], recipe: Recipe) -> list[Run]:
    own = [run for run in runs if run.is_ok and run.config.recipe == recipe]
    by_name = sorted(own, key=lambda run: run.name)
    newest = sorted(by_name, key=lambda run: str(run.record.get("started_at")), reverse=True)
    return sorted(newest, key=lambda run: -run.num_steps)


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
        + [(c.name, certificate.find_contradictions(c)) for c in store.certificates],
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
                    "The code counts FLOPs, or finds the steady state, otherwise than when these "
                    "records were written. The tables show today's counts, and figures of the "
                    "steps that the records call steady.",
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


def _ok_cells(store: Store) -> list[Run]:
    return [cell.run for cell in store.cells if cell.run is not None and cell.run.is_ok]


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
    recipes: dict[str, set[Recipe]] = {}
    for run in runs:
        recipes.setdefault(escaped(describe(run)), set()).add(run.config.recipe)
    if len(recipes) == 1:
        return next(iter(recipes))
    return "<br>".join(f"{_in_order(own)}: {value}" for value, own in recipes.items())


def _in_order(recipes: Collection[Recipe]) -> str:
    return ", ".join(
        run_formatting.TITLES[recipe] for recipe in get_args(Recipe) if recipe in recipes
    )


def _data(run: Run) -> str:
    data = run.record["data"]
    proof = f"sha256 {data['sha256']}" if data["sha256"] else "no sha256: it has no files"
    return f"{without_places(data['description'], run.record['hardware'])}; {proof}"


Describe = Mapping[str, Callable[[Run], str]]


def _overview(mains: Mapping[Recipe, Run], described: Describe) -> str:
    """Recipes side by side: one column each."""
    if not mains:
        return "Nothing to compare: no run ended well."
    columns = [run_formatting.TITLES[recipe] for recipe in mains]
    body = [(name, *map(describe, mains.values())) for name, describe in described.items()]
    return table(("recipe", *columns), body)


def _described(store: Store) -> Describe:
    """What is told of every run that ended well, as cells."""
    return {
        "size": run_formatting.size,
        "parameters": lambda run: human_count(count_parameters(run.config.model)),
        "devices": run_formatting.devices,
        "precision": lambda run: run.config.parallel.precision,
        "batch": run_formatting.batch,
        "steps": lambda run: f"{run.num_steps:,}",
        "validation loss": lambda run: f"{run.record['validation']['loss']:.4f} nats",
        "metric": run_formatting.metric,
        "trivial baseline": run_formatting.baseline,
        "baseline beaten": run_formatting.verdict,
        "speed": run_formatting.speed,
        "MFU": run_formatting.utilisation,
        "of the measured ceiling": run_formatting.share_of_ceiling,
        "flags": run_formatting.flags,
        "loss parity": lambda run: parity_cell(run, store.certificates),
        "FLOPs": run_formatting.overview_flops,
        "peak memory": run_formatting.memory,
        "command": lambda run: f"{escaped(run.record['command'])}",
        "record": run_formatting.record,
    }


def _recipe_section(recipe: Recipe, runs: Sequence[Run], store: Store, plots: str) -> list[str]:
    sweeps = _sweep_sections(recipe, store, plots)
    if not runs:  # sweeps of which no cell ended well, or nothing
        return [f"## {run_formatting.TITLES[recipe]}", *sweeps] if sweeps else []
    run, others = runs[0], runs[1:]
    described, single = _described(store), {run.name for run in store.single_runs}
    record = run.record
    title = run_formatting.TITLES[run.config.recipe]
    plot = quote(str(PurePosixPath(plots, run_formatting.plot_name(run))))
    return [
        f"## {title}",
        f"{escaped(run_formatting.label(run))}, {count(run.num_steps, 'step')}; "
        f"record {link(run.name)}, "
        "made by",
        code_block(record["command"], "sh"),
        "### Architecture",
        code_block(draw_architecture(run.config), "mermaid"),
        "### Parameters",
        _summary(record["summary"]),
        "### Training",
        code_block("\n".join(run.log[-LOG_LINES:])),
        f"![Loss of {title} over the optimizer steps]({plot})",
        "### Speed and memory",
        figures_table(run, others),
        "### FLOPs and MFU",
        *passport_tables(run),
        *_other_runs([run for run in runs if run.name in single], described),
        *sweeps,
    ]


def _sweep_sections(recipe: Recipe, store: Store, plots: str) -> list[str]:
    """Every sweep of a recipe, and what all its runs say of devices and strategies."""
    blocks, names = [], sweep_names(store)
    for (of, sweep), own in sweeps_of(store).items():
        if of == recipe:
            drawn = [
                (plot.title, quote(str(PurePosixPath(plots, f"{plot.name}.svg"))))
                for plot in plots_of(slug_of(recipe, names[sweep]), own)
            ]
            blocks += sweep_blocks(names[sweep], own, store.certificates, drawn)
    everything = [run for run in store.runs if run.config.recipe == recipe]
    swept = [cell for cell in store.cells if cell.outcome.recipe == recipe]
    return [*blocks, *scaling_blocks(everything, store.certificates, swept)]


def _summary(summary: str) -> str:
    block = code_block(summary)
    rows = len(summary.splitlines())
    if rows < LONG_SUMMARY:
        return block
    return f"<details>\n<summary>Table of {rows} lines</summary>\n\n{block}\n\n</details>"


def _other_runs(runs: Sequence[Run], described: Describe) -> list[str]:
    if len(runs) < 2:
        return []
    body = [[describe(run) for describe in described.values()] for run in runs]
    return ["### All runs", apart([run.record for run in runs]), table(tuple(described), body)]
