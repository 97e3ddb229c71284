"""The report: a store of runs goes in; RESULTS.md, its pages and their plots come out.

RESULTS.md gives the answer; everything else stands on generated pages, one click away. Pure: equal
records give equal bytes. What is not known is blank with the reason in words, and every figure
names the record it comes from, whose checksummed figures are believed.
"""

import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import get_args
from urllib.parse import quote, unquote

from scaling.analysis.efficiency import Curve, ModelOnMachine, Scatter, find_curves, find_scatters
from scaling.analysis.fastest import compare_strategies
from scaling.markdown import code_block, command_lines, details, escaped, link, page_of, table
from scaling.report import run_formatting
from scaling.report.plots import draw, plots_of
from scaling.report.sections.answer import Answer, answer_blocks, find_answers
from scaling.report.sections.conditions import conditions_page, measured_on
from scaling.report.sections.fastest import fastest_blocks
from scaling.report.sections.parity import parity_cell, parity_section
from scaling.report.sections.runs import runs_blocks
from scaling.report.sections.scaling import scaling_blocks
from scaling.report.sections.sweep import sweep_blocks
from scaling.report.staleness import MARK, NOT_COMPARED, Today, explain, marked, state_comment
from scaling.report.sweep_names import slug_of, sweep_names, sweeps_of
from scaling.store.reader import Store
from scaling.store.run import Run
from unitransformer.config import Recipe
from unitransformer.costs.flops import count_parameters
from unitransformer.record.parameter_summary import human_count
from unitransformer.record.units import count

LOG_LINES = 12
SHOWN_PLOTS = ("speed-by-devices", "speed-by-batch")  # in RESULTS.md; the pages have all
# Rows of the overview that become a sentence above it where all recipes agree.
MAY_BE_SHARED = ("size", "devices", "precision", "batch", "MFU", "flags", "loss parity")
Pages = dict[PurePosixPath, str]
Describe = Mapping[str, Callable[[Run], str]]

FASTEST = (
    "The fastest configuration with proven loss parity, over all strategies, precisions and batch "
    "sizes that were tried, and its lead over the runner-up."
)
HOW_TO_READ = (
    "- Speed is that of all devices together at the median steady step, with a 95 % interval. "
    "Launches are their number and the range of their speeds.",
    "- Utilisation is MFU against the data sheet's peak where there is one; else the share of the "
    "ceiling, the matrix-multiply rate that the same machine reached in the same job.",
    "- Weak efficiency is speed per device over that of the same configuration on the fewest "
    "devices, at the same batch per device.",
    "- The lead is a ratio of speeds. Where its interval holds 1 it is a tie.",
)
SAME_CORES = (
    "- The ranks of a CPU share its cores: more devices are no more hardware, and an efficiency of "
    "1/n on n devices is ideal."
)
MOST_SUMMARY = 80  # lines of a parameter summary that RESULTS.md holds


def render_pages(
    store: Store,
    *,
    command: str,
    plots: str,
    pages: str = "RESULTS-pages",
    name: str = "RESULTS.md",
    today: Today = NOT_COMPARED,
) -> Pages:
    """Every generated Markdown page by its path from the folder of RESULTS.md, itself included.

    Args:
        command: what writes these pages again, typed in the folder of RESULTS.md.
        plots: path from RESULTS.md to the folder with the files of `draw_plots`.
        pages: path from RESULTS.md to the folder of the other pages.
        name: file name of RESULTS.md.
        today: what the records are compared with; what is stale is marked.
    """
    folder = PurePosixPath(pages)
    scatters = find_scatters(store.runs)
    curves = {
        recipe: find_curves((run for run in store.runs if run.config.recipe == recipe), scatters)
        for recipe in get_args(Recipe)
    }
    contents = {
        "conditions.md": ("Conditions", conditions_page(store)),
        "parity.md": ("Loss parity", parity_section(store.certificates)),
        "runs.md": ("Single runs", _runs_page(store)),
        "scaling.md": ("Scaling and fastest strategy", _scaling_page(store, curves)),
        **_sweep_pages(store, plots, scatters),
    }
    contents = {file: (title, blocks) for file, (title, blocks) in contents.items() if blocks}
    links = {file: link(str(folder / file), file) for file in contents}
    main = [
        *_results(store, command, plots, _answers(store, curves, scatters), links),
        explain(today),
        state_comment(command, today),
    ]
    written = {PurePosixPath(name): marked(page_of(main), store, today)}
    for file, (title, blocks) in contents.items():
        back = f"Generated, never edited. Back to {link(name)}."
        text = marked(page_of([f"# {title}", back, *blocks]), store, today)
        if MARK in text:
            text += f"\n{MARK} after a record: {link(name)} says why it is stale.\n"
        written[folder / file] = rebased(text, folder)
    return written


def rebased(text: str, folder: PurePosixPath) -> str:
    """A page whose links lead from its own folder; they were written from that of RESULTS.md."""

    def rebase(found: re.Match[str]) -> str:
        return f"{found[1]}({_relative(found[2], str(folder))})"

    parts = re.split(r"^(`{3,}.*?^`{3,})$", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if index % 2 else re.sub(r"((?<!\\)\])\(([^()\s]+)\)", rebase, part)
        for index, part in enumerate(parts)
    )


@lru_cache(maxsize=4096)
def _relative(target: str, folder: str) -> str:
    is_elsewhere = target.startswith(("#", "/")) or "://" in target
    return target if is_elsewhere else quote(posixpath.relpath(unquote(target), folder))


def draw_plots(store: Store) -> dict[str, bytes]:
    """SVG files by name: the loss curve of each recipe's longest run, the plots of each sweep."""
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
    for (recipe, sweep), swept in sweeps_of(store).items():
        slug = slug_of(recipe, names[sweep])
        drawn |= {f"{plot.name}.svg": draw(plot) for plot in plots_of(slug, swept)}
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


# ---------------------------------------------------------------------------------- RESULTS.md


def _results(
    store: Store,
    command: str,
    plots: str,
    answers: Sequence[str],
    links: Mapping[str, str],
) -> list[str]:
    recipes = _runs_of_recipes(store)
    mains = {recipe: runs[0] for recipe, runs in recipes.items()}
    return [
        "# Results",
        _opening(store, links),
        *answers,
        "## Longest training run of each recipe",
        *_overview(mains, _described(store)),
        *(
            block
            for recipe in get_args(Recipe)
            for block in _recipe_section(recipe, recipes.get(recipe, []), store, plots, links)
        ),
        "## More",
        "\n".join(f"- {about[file]}: {link_}" for file, link_ in links.items())
        if (about := _about_pages(links))
        else "",
        "## How to write this file again",
        "It is generated and never edited. In its own folder:",
        code_block(command, "sh"),
    ]


def _opening(store: Store, links: Mapping[str, str]) -> str:
    runs = [run for run in store.runs if run.is_ok]
    proofs = f" and {count(len(store.certificates), 'certificate')} of loss parity"
    told = f"{count(len(store.runs), 'run')}{proofs if store.certificates else ''}"
    where = f", measured on {measured_on(runs)}" if runs else ""
    return f"{told}{where}. Details: {', '.join(links.values())}."


def _about_pages(links: Mapping[str, str]) -> dict[str, str]:
    told = {
        "conditions.md": "Hardware, versions, commits, data; failed runs; contradictions",
        "parity.md": "Loss parity of every strategy, precision and device count",
        "runs.md": "Single runs: architecture, speed, memory, FLOPs by convention",
        "scaling.md": "Speed-up, efficiency, time lost, scaling laws, fastest strategy",
    }
    return {file: told.get(file, "Every configuration and launch of the sweep") for file in links}


def _answers(
    store: Store, curves: Mapping[Recipe, Sequence[Curve]], scatters: Mapping[ModelOnMachine, Scatter]
) -> list[str]:
    blocks, every = list[str](), list[Answer]()
    for recipe in get_args(Recipe):
        runs = [run for run in store.runs if run.config.recipe == recipe]
        answers = find_answers(runs, curves[recipe], store.certificates)
        every += answers
        if answers:
            blocks += [f"### {run_formatting.TITLES[recipe]}", *answer_blocks(answers)]
    if not blocks:
        return []
    how = [*HOW_TO_READ, *_about_intervals(scatters)]
    if any(curve.threads for answer in every for curve in answer.curves):
        how.append(SAME_CORES)
    return ["## Fastest configuration", FASTEST, *blocks, "\n".join(["How to read it:", "", *how])]


def _about_intervals(scatters: Mapping[ModelOnMachine, Scatter]) -> list[str]:
    """The rule of the intervals, once."""
    if not scatters:
        return []
    least = min(scatter.deviation for scatter in scatters.values())
    most = max(scatter.deviation for scatter in scatters.values())
    spread = f"{least:.1%}" if f"{least:.1%}" == f"{most:.1%}" else f"{least:.1%} to {most:.1%}"
    return [
        "- Two launches alone say too little about a third. The interval of up to four launches "
        "uses the scatter between launches, pooled over all configurations of a model (a standard "
        f"deviation of {spread}); five or more have an interval of their own."
    ]


def _overview(mains: Mapping[Recipe, Run], described: Describe) -> list[str]:
    """Recipes side by side: one column each."""
    if not mains:
        return ["Nothing to compare: no run ended well."]
    rows = {name: [describe(run) for run in mains.values()] for name, describe in described.items()}
    alike = {name for name in MAY_BE_SHARED if len(rows[name]) > 1 and len(set(rows[name])) == 1}
    told = "; ".join(f"{name} {rows[name][0]}" for name in rows if name in alike)
    columns = [run_formatting.TITLES[recipe] for recipe in mains]
    body = [(name, *own) for name, own in rows.items() if name not in alike]
    return [f"Same for all: {told}." if told else "", table(("recipe", *columns), body)]


def _described(store: Store) -> Describe:
    """What is said about every run that ended well, as cells."""
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
        "record": run_formatting.record,
    }


def _recipe_section(
    recipe: Recipe, runs: Sequence[Run], store: Store, plots: str, links: Mapping[str, str]
) -> list[str]:
    swept = {sweep: own for (of, sweep), own in sweeps_of(store).items() if of == recipe}
    if not runs and not swept:
        return []
    blocks, title = [f"## {run_formatting.TITLES[recipe]}"], run_formatting.TITLES[recipe]
    if runs:
        run = runs[0]
        blocks += [
            f"{escaped(run_formatting.label(run))}, {count(run.num_steps, 'step')} "
            f"({run_formatting.record(run)}):",
            code_block(command_lines(run.record["command"]), "sh"),
            f"![Loss of {title} over the optimizer steps]"
            f"({_plot(plots, run_formatting.plot_name(run))})",
            code_block("\n".join(run.log[-LOG_LINES:])),
            _summary(run, links["runs.md"]),
        ]
    if swept:
        largest = max(swept, key=lambda sweep: len(swept[sweep]))
        drawn = plots_of(slug_of(recipe, sweep_names(store)[largest]), swept[largest])
        shown = [plot for plot in drawn if plot.name.endswith(SHOWN_PLOTS)]
        blocks += [f"![{plot.title}]({_plot(plots, f'{plot.name}.svg')})" for plot in shown]
        files = [page_name(sweep_names(store)[sweep]) for sweep in swept]
        blocks.append(f"All configurations: {', '.join(links[file] for file in files)}.")
    return blocks


def _summary(run: Run, page: str) -> str:
    summary = run.record["summary"]
    lines = len(summary.splitlines())
    if lines > MOST_SUMMARY:
        return f"The parameter summary has {lines} lines: {page}."
    return details("Parameters", code_block(summary))


def _plot(plots: str, name: str) -> str:
    return quote(str(PurePosixPath(plots, name)))


# ---------------------------------------------------------------------------------- pages


def page_name(sweep: str) -> str:
    """The file of a sweep's page, by the name of the sweep."""
    name = sweep.replace(" ", "-")
    fixed = ("conditions", "parity", "runs", "scaling")
    return f"sweep-{name}.md" if name in fixed else f"{name}.md"


def _runs_page(store: Store) -> list[str]:
    single, described = {run.name for run in store.single_runs}, _described(store)
    return [
        block
        for runs in _runs_of_recipes(store).values()
        for block in runs_blocks(runs, [run for run in runs if run.name in single], described)
    ]


def _scaling_page(store: Store, curves: Mapping[Recipe, Sequence[Curve]]) -> list[str]:
    blocks = []
    for recipe in get_args(Recipe):
        runs = [run for run in store.runs if run.config.recipe == recipe]
        swept = [cell for cell in store.cells if cell.outcome.recipe == recipe]
        scaling = scaling_blocks(curves[recipe])
        fastest = fastest_blocks(compare_strategies(runs, store.certificates, swept))
        if scaling:
            blocks += [f"## Scaling of {run_formatting.TITLES[recipe]}", *scaling]
        if fastest:
            blocks += [f"## Fastest strategy of {run_formatting.TITLES[recipe]}", *fastest]
    return blocks


def _sweep_pages(
    store: Store, plots: str, scatters: Mapping[ModelOnMachine, Scatter]
) -> dict[str, tuple[str, list[str]]]:
    """Title and blocks of each sweep's page, with a section for each recipe."""
    names = sweep_names(store)
    pages: dict[str, tuple[str, list[str]]] = {}
    for (recipe, sweep), swept in sweeps_of(store).items():
        file = page_name(names[sweep])
        _, blocks = pages.setdefault(file, (f"Sweep {escaped(names[sweep])}", []))
        drawn = [
            (plot.title, _plot(plots, f"{plot.name}.svg"))
            for plot in plots_of(slug_of(recipe, names[sweep]), swept)
        ]
        blocks += [f"## {run_formatting.TITLES[recipe]}"]
        blocks += sweep_blocks(swept, store.certificates, drawn, scatters)
    return pages
