"""Renders RESULTS.md, its pages and its plots from a store.

RESULTS.md gives the answer; everything else is on generated pages, one click away. Equal records
give equal bytes. A figure that is missing has its reason, and every figure links its record.
"""

import posixpath
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import get_args
from urllib.parse import unquote

from scaling.markdown import (
    code_block,
    command_block,
    details,
    escaped,
    link,
    note,
    page_of,
    quoted,
    table,
)
from scaling.report import run_formatting, staleness
from scaling.report.options import ReportOptions
from scaling.report.run_formatting import TITLES
from scaling.report.sections.answer import UNDECIDED, answer_blocks, find_answers
from scaling.report.sections.conditions import conditions_page, measured_on
from scaling.report.sections.fastest import fastest_blocks
from scaling.report.sections.parity import parity_cell, parity_section
from scaling.report.sections.peers import peers_blocks
from scaling.report.sections.predictions import predictions_page, predictions_summary
from scaling.report.sections.regressions import regressions_blocks
from scaling.report.sections.runs import runs_page
from scaling.report.sections.scaling import scaling_blocks
from scaling.report.sections.slurm_jobs import jobs_page, jobs_summary
from scaling.report.sections.sweep import sweep_blocks
from scaling.report.store_analysis import StoreAnalysis, page_name, sweep_names
from scaling.store.reader import Store
from unitransformer.config import Recipe
from unitransformer.record.units import format_count

HEADING = "# Results"
LOG_LINES = 12
LONGEST_SUMMARY = 80  # lines of a parameter summary that RESULTS.md holds
SHOWN_PLOTS = ("speed-by-devices", "speed-by-batch")  # in RESULTS.md; the pages have all
# Rows of the overview that become a sentence above it where all recipes agree.
MAY_BE_SHARED = ("size", "devices", "precision", "batch", "MFU", "flags", "loss parity")
PAGES = {
    "conditions.md": "Hardware, versions, commits, data; failed runs; files left out",
    "parity.md": "Loss parity of every strategy, precision and device count",
    "predictions.md": "Speed and memory predicted beside measured, for every configuration",
    "runs.md": "Single runs: architecture, speed, memory, FLOPs by convention",
    "scaling.md": "Speed-up, efficiency, time lost, scaling laws, fastest strategy",
}
JOBS_PAGE = "slurm-jobs.md"
ABOUT_PAGE = "Generated, never edited. Back to"  # then a link to RESULTS.md
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
    "- The lead is a ratio of speeds. Where its interval contains 1 it is a tie.",
    "- Tried are the configurations with a steady speed, of those that the studies of their sweeps "
    "name; where more have not ended than have a speed, the fastest is only the best of these.",
)
ABOUT_UNDECIDED = (
    "- Not confirmed: it is not known whether other launches of the two would show this lead. A "
    "launch with few steps has no interval, and the interval of one launch says nothing about "
    "another: a lead of single launches counts only where it exceeds the drift of the machine "
    "between them. Two launches of each decide it."
)
SAME_CORES = (
    "- The ranks of a CPU share its cores: more devices are no more hardware, and an efficiency of "
    "1/n on n devices is ideal."
)


def render_pages(analysis: StoreAnalysis, options: ReportOptions) -> dict[PurePosixPath, str]:
    """Returns every generated Markdown page by its path from the folder of RESULTS.md.

    Stale records are marked. Raises ValueError if a page would overwrite RESULTS.md.
    """
    store, today = analysis.store, analysis.today
    name, plots = options.out.name, options.relative(options.plots)
    folder = PurePosixPath(options.relative(options.pages))
    contents = {
        "conditions.md": ("Conditions", conditions_page(store)),
        "parity.md": ("Loss parity", parity_section(store.certificates)),
        "predictions.md": ("Predicted and measured", predictions_page(analysis)),
        "runs.md": ("Single runs", runs_page(analysis)),
        "scaling.md": ("Scaling and fastest strategy", _scaling_page(analysis)),
        JOBS_PAGE: ("Jobs on SLURM", jobs_page(store)),
        **_sweep_pages(analysis, plots),
    }
    contents = {file: (title, blocks) for file, (title, blocks) in contents.items() if blocks}
    links = {file: link(str(folder / file), file) for file in contents}
    about = {**PAGES, JOBS_PAGE: jobs_summary(store)}
    more = [
        f"- {about.get(file, 'Every configuration and launch of the sweep')}: {page}"
        for file, page in links.items()
    ]
    more += [f"- {escaped(reason)}." for reason in analysis.predictions[1]]
    main = [
        HEADING,
        _opening(store, links),
        *note("Sweeps that are not complete.", _incomplete(analysis)),
        *_answers(analysis),
        *peers_blocks(store.comparisons),
        *regressions_blocks(store.self_tests),
        *predictions_summary(analysis, links.get("predictions.md", "")),
        "## Longest training run of each recipe",
        *_overview(analysis),
        *(block for recipe in TITLES for block in _recipe(recipe, analysis, plots, links)),
        "## More",
        "\n".join(more),
        "## How to write this file again",
        "It is generated and never edited. In its own folder:",
        code_block(options.command, "sh"),
        staleness.explain(today),
        staleness.state_comment(options.command, today),
    ]
    written = {PurePosixPath(name): staleness.marked(page_of(main), store, today)}
    for file, (title, blocks) in contents.items():
        if folder / file in written:
            raise ValueError(f"out {options.out} is one of the pages; choose another path")
        back = f"{ABOUT_PAGE} {link(name)}."
        text = staleness.marked(page_of([f"# {title}", back, *blocks]), store, today)
        if staleness.MARK in text:
            text += f"\n{staleness.MARK} after a record: {link(name)} says why it is stale.\n"
        written[folder / file] = rebased(text, folder)
    # The name of a file, such as of the data, may be no UTF-8.
    return {file: text.encode(errors="replace").decode() for file, text in written.items()}


def draw_plots(analysis: StoreAnalysis) -> dict[str, bytes]:
    """Returns SVG files by name: the loss of each recipe's longest run, the plots of each sweep."""
    from unitransformer.plots import figure_bytes, line_panels, loss_figure

    drawn = {}
    for run, *_ in analysis.longest_runs.values():
        validation = run.record["validation"]
        baseline = validation["baseline"]
        has_loss = baseline is not None and baseline["loss"] is not None
        figure = loss_figure(
            run.record["loss"],
            validation["history"],
            title=run_formatting.label(run),
            baseline=(run_formatting.baseline_name(baseline), baseline["loss"])
            if has_loss
            else None,
        )
        drawn[run_formatting.plot_name(run)] = figure_bytes(figure, "svg")
    for plot in (plot for sweep in analysis.sweeps for plot in sweep.plots):
        labels = {name: getattr(plot, name) for name in ("title", "caption", "x", "y", "markers")}
        drawn[f"{plot.name}.svg"] = figure_bytes(line_panels(plot.panels, **labels), "svg")
    return drawn


def rebased(text: str, folder: PurePosixPath) -> str:
    """Rewrites links that lead from the folder of RESULTS.md for the folder of a page."""

    def rebase(match: re.Match[str]) -> str:
        return f"{match[1]}({_relative(match[2], str(folder))})"

    parts = re.split(r"^(`{3,}.*?^`{3,})$", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if index % 2 else re.sub(r"((?<!\\)\])\(([^()\s]+)\)", rebase, part)
        for index, part in enumerate(parts)
    )


def _relative(target: str, folder: str) -> str:
    if target.startswith(("#", "/")) or "://" in target:
        return target
    parts = folder.split("/")
    if "." not in folder and not target.startswith((parts[0], "./")):  # as of most records
        return f"{'../' * len(parts)}{target}"
    return quoted(posixpath.relpath(unquote(target, errors="surrogateescape"), folder))


def _image(title: str, plots: str, name: str) -> str:
    return f"![{title}]({quoted(str(PurePosixPath(plots, name)))})"


def _opening(store: Store, links: Mapping[str, str]) -> str:
    runs = store.successful_runs
    parts = [format_count(len(store.runs), "run")]
    if store.certificates:
        parts.append(f"{format_count(len(store.certificates), 'certificate')} of loss parity")
    if store.comparisons:
        count = format_count(len(store.comparisons), "comparison")
        parts.append(f"{count} with other implementations")
    if store.self_tests:
        parts.append(f"{format_count(len(store.self_tests), 'self-test')} of regression checks")
    where = f", measured on {escaped(measured_on(runs))}" if runs else ""
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    return f"{listed}{where}. Details: {', '.join(links.values())}."


def _incomplete(analysis: StoreAnalysis) -> list[str]:
    names = sweep_names(analysis.store)
    lines = {name: analysis.describe_coverage(folder) for folder, name in names.items()}
    return [escaped(f"{name}: {missing}.") for name, missing in lines.items() if missing]


def _answers(analysis: StoreAnalysis) -> list[str]:
    blocks, shares_cores = list[str](), False
    for recipe, points in analysis.points.items():
        certificates = analysis.store.certificates
        if answers := find_answers(points, certificates, analysis.count_others):
            curves = analysis.curves[recipe]
            blocks += [f"### {TITLES[recipe]}", *answer_blocks(answers, curves)]
            shares_cores |= any(curve.threads for curve in curves if curve.scaling == "weak")
    if not blocks:
        return []
    how = ["How to read it:", "", *HOW_TO_READ]
    if any(UNDECIDED in block for block in blocks):
        how.append(ABOUT_UNDECIDED)
    how += _about_intervals(analysis)
    if shares_cores:
        how.append(SAME_CORES)
    return ["## Fastest configuration", FASTEST, *blocks, "\n".join(how)]


def _about_intervals(analysis: StoreAnalysis) -> list[str]:
    deviations = sorted(scatter.deviation for scatter in analysis.scatters.values())
    if not deviations:
        return []
    ends = dict.fromkeys(f"{deviations[place]:.1%}" for place in (0, -1))
    return [
        "- Two launches alone say too little about a third. The interval of up to four launches "
        "uses the scatter between launches, pooled over all configurations of a model (a standard "
        f"deviation of {' to '.join(ends)}); five or more have an interval of their own."
    ]


def _overview(analysis: StoreAnalysis) -> list[str]:
    certificates = analysis.store.certificates
    columns = {
        TITLES[recipe]: run_formatting.overview(runs[0], parity_cell(runs[0], certificates))
        for recipe, runs in analysis.longest_runs.items()
    }
    if not columns:
        return ["Nothing to compare: no run ended well."]
    rows, shared = [], []
    for name in next(iter(columns.values())):
        cells = [cells[name] for cells in columns.values()]
        if name in MAY_BE_SHARED and len(cells) > 1 and len(set(cells)) == 1:
            shared.append(f"{name}: {cells[0]}")
        else:
            rows.append((name, *cells))
    about = f"Same for all: {'; '.join(shared)}." if shared else ""
    return [about, table(("recipe", *columns), rows)]


def _recipe(
    recipe: Recipe, analysis: StoreAnalysis, plots: str, links: Mapping[str, str]
) -> list[str]:
    runs = analysis.longest_runs.get(recipe)
    sweeps = [sweep for sweep in analysis.sweeps if sweep.recipe == recipe]
    blocks = [f"## {TITLES[recipe]}"] if runs or sweeps else []
    if runs:
        run = runs[0]
        summary, lines = run.record["summary"], len(run.record["summary"].splitlines())
        title = f"Loss of {TITLES[recipe]} over the optimizer steps"
        blocks += [
            f"{escaped(run_formatting.label(run))}, {format_count(run.num_steps, 'step')} "
            f"({run_formatting.record(run)}):",
            command_block(run_formatting.command(run)),
            _image(title, plots, run_formatting.plot_name(run)),
            code_block("\n".join(run.log[-LOG_LINES:])),
            details("Parameters", code_block(summary))
            if lines <= LONGEST_SUMMARY
            else f"The parameter summary has {lines} lines: {links['runs.md']}.",
        ]
    if sweeps:
        largest = max(sweeps, key=lambda sweep: (sweep.largest_model, len(sweep.cells)))
        shown = [plot for plot in largest.plots if plot.name.endswith(SHOWN_PLOTS)]
        pages = ", ".join(links[page_name(sweep.name)] for sweep in sweeps)
        images = [_image(plot.title, plots, f"{plot.name}.svg") for plot in shown]
        blocks += [*images, f"All configurations: {pages}."]
    return blocks


def _scaling_page(analysis: StoreAnalysis) -> list[str]:
    blocks = []
    for recipe in get_args(Recipe):
        scaling = scaling_blocks(analysis.curves[recipe])
        fastest = fastest_blocks(analysis.comparisons[recipe])
        blocks += [f"## Scaling of {TITLES[recipe]}", *scaling] if scaling else []
        blocks += [f"## Fastest strategy of {TITLES[recipe]}", *fastest] if fastest else []
    return blocks


def _sweep_pages(analysis: StoreAnalysis, plots: str) -> dict[str, tuple[str, list[str]]]:
    pages: dict[str, tuple[str, list[str]]] = {}
    for sweep in analysis.sweeps:
        title = f"Sweep {escaped(sweep.name)}"
        missing = analysis.describe_coverage(sweep.cells[0].sweep)
        incomplete = [f"Not complete: {escaped(missing)}."] if missing else []
        _, blocks = pages.setdefault(page_name(sweep.name), (title, incomplete))
        images = [_image(plot.title, plots, f"{plot.name}.svg") for plot in sweep.plots]
        blocks.append(f"## {TITLES[sweep.recipe]}")
        blocks += sweep_blocks(sweep, analysis.store.certificates, images)
    return pages
