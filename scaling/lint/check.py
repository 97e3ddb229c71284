"""RESULTS.md goes in; what is wrong with it comes out. `python -m scaling lint RESULTS.md`.

Three questions. Does its own command write it again, byte by byte? Does the arithmetic of its
rows and of the raw samples hold? Are the records older than the code? The first two give
errors (exit code 1), the last one warnings (exit code 0).
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import jsonargparse

from scaling.lint.contradictions import find_contradictions, find_recounts
from scaling.lint.table_arithmetic import check_efficiencies, check_rows
from scaling.lint.text_diff import first_difference
from scaling.parity import certificate as certificates
from scaling.report.options import (
    ReportOptions,
    build_report_parser,
    read_report_options,
    report_command,
)
from scaling.report.results_md import draw_plots, page_name, render_pages
from scaling.report.rows import rows
from scaling.report.run_formatting import TITLES
from scaling.report.staleness import (
    NO_CHECKOUT,
    ReportState,
    CurrentCode,
    measured_files,
    compare_with_today,
    read_state,
    stale_reasons,
)
from scaling.report.sweep_names import sweep_names
from scaling.store.conditions import differences, without_threads
from scaling.store.reader import Store, load_store, relative_name
from scaling.store.run import Run
from unitransformer.config import Recipe
from unitransformer.record.units import count

COMMAND = ("python", "-m", "scaling", "report")
Finding = tuple[str, str]  # where, what


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is wrong, what is old, what was looked at."""

    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    checked: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return 1 if self.errors else 0


def render(findings: Findings) -> str:
    """A line for each finding, then what was checked."""
    kinds = (("error", findings.errors), ("warning", findings.warnings))
    lines = [f"{kind}: {where}: {told}" for kind, found in kinds for where, told in found]
    counts = ", ".join(count(len(found), kind) for kind, found in kinds)
    return "\n".join([*lines, *findings.checked, counts])


def lint(path: Path, *, code: Path | None = None) -> Findings:
    """Check a report against its records, its own figures and today's code.

    Args:
        path: of the report; its command is read as if typed in its folder.
        code: checkout whose HEAD the records are compared with; by default that of this code.

    Raises:
        ValueError: no such file, or no text.
        OSError: it cannot be read.
    """
    text = _read(path)
    state = read_state(text)
    options = _options_in(state, path)
    if isinstance(options, str):
        return Findings(errors=((path.name, options),), warnings=(), checked=())
    assert state is not None, "without it there are no options"
    try:
        store = load_store(options.folders, relative_to=path.parent)
    except ValueError as error:
        return Findings(errors=((path.name, str(error)),), warnings=(), checked=())
    today = compare_with_today(store, code or Path(__file__).parents[2])
    made = rows(store)
    pages = _pages(options, store, state.today)
    return Findings(
        errors=(
            *_compare(pages, options),
            *_compare_plots(options, store),
            *check_rows(made, store.runs),
            *check_efficiencies(store.runs),
            *_contradictions(store),
            *_curves(path, options, store),
        ),
        warnings=(
            *_left_out(store),
            *_recounts(store),
            *_stale(store, today),
            *_marks(state, path, today),
        ),
        checked=(
            f"arithmetic of {count(len(made), 'row')}",
            f"bytes of {count(len(pages), 'page')}",
            _records_looked_at(store),
            _about_code(today),
        ),
    )


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a report that `scaling report` wrote")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error.reason}); give a report") from error


def _records_looked_at(store: Store) -> str:
    proofs = count(len(store.certificates), "certificate")
    return f"samples of {count(len(store.runs), 'record')} and {proofs}"


# ------------------------------------------------------------------------------ the same bytes


def _options_in(state: ReportState | None, path: Path) -> ReportOptions | str:
    """Paths of the command that wrote the report, or what is wrong with it."""
    how = f"it does not end with its `{shlex.join(COMMAND)} DIR`; write it again with that"
    if state is None:
        return how
    arguments = shlex.split(state.command)
    if tuple(arguments[: len(COMMAND)]) != COMMAND:
        return how
    try:
        given = read_report_options(build_report_parser().parse_args(arguments[len(COMMAND) :]))
    except (jsonargparse.ArgumentError, ValueError) as error:
        return f"its command cannot be read: {' '.join(str(error).split())}"
    if given.out.name != path.name:
        return f"its command writes {given.out}; name the file so, or write it again as {path.name}"
    return ReportOptions(
        folders=tuple(path.parent / folder for folder in given.folders),
        out=path.parent / given.out,
        plots=path.parent / given.plots,
        pages=path.parent / given.pages,
    )


def _pages(options: ReportOptions, store: Store, today: CurrentCode) -> dict[PurePosixPath, str]:
    """Every generated page as its records give it, by its path from the folder of the report.

    It is held against what it was held against then: code that has changed since is another
    finding.
    """
    return render_pages(
        store,
        command=report_command(options),
        plots=relative_name(options.plots, options.out.parent),
        pages=relative_name(options.pages, options.out.parent),
        name=options.out.name,
        today=today,
    )


def _compare(pages: Mapping[PurePosixPath, str], options: ReportOptions) -> Iterator[Finding]:
    """Where a page is not what the records give today."""
    for name, again in pages.items():
        file = options.out.parent / name
        if not file.is_file():
            yield str(name), "is missing; write the report again"
        elif (text := _read(file)) != again:
            line, difference = first_difference(text, again)
            yield f"{name}:{line}", difference


def _compare_plots(options: ReportOptions, store: Store) -> Iterator[Finding]:
    plots = relative_name(options.plots, options.out.parent)
    for name, drawn in draw_plots(store).items():
        file, where = options.plots / name, f"{plots}/{name}"
        if not file.is_file():
            yield where, "is missing; write the report again"
        elif file.read_bytes() != drawn:
            yield where, "is not the plot that the records give; write the report again"


# ------------------------------------------------------------------------------ the records


def _contradictions(store: Store) -> Iterator[Finding]:
    """Fields of records that do not follow from their samples or from one another."""
    for run in store.runs:
        if run.is_ok:
            yield from ((run.name, told) for told in find_contradictions(run))
    for certificate in store.certificates:
        for told in certificates.find_contradictions(certificate):
            yield certificate.name, told


def _recounts(store: Store) -> Iterator[Finding]:
    """What today's code counts otherwise than the code that wrote a record."""
    for run in store.runs:
        if run.is_ok:
            yield from ((run.name, what) for what in find_recounts(run))


def _curves(path: Path, options: ReportOptions, store: Store) -> Iterator[Finding]:
    """Rows that were measured under different conditions, and a page that does not say so."""
    names = sweep_names(store)
    for (sweep, recipe), runs in _joined(store).items():
        page = options.pages / (page_name(names[sweep]) if sweep else "runs.md")
        text = page.read_text() if page.is_file() else ""
        section = _section(text, f"## {TITLES[recipe]}")
        records = [run.record for run in runs]
        if sweep:
            # Ranks that share cores have fewer threads: the page on scaling says so.
            records = [without_threads(record) for record in records]
        else:
            section = _section(section, "### All runs")
        for line in differences(records):
            field = re.split(r"(?<= differ)|:", line)[0]
            if field not in " ".join(section.replace("\n>", " ").split()):
                whose = f"{sweep and sweep + ', '}{TITLES[recipe]}"
                told = f"{whose}: {len(runs)} records in one table, and nothing says: {line}"
                yield path.name, told


def _section(text: str, heading: str) -> str:
    """From a heading to the next one of its level or above."""
    _, _, after = text.partition(f"\n{heading}\n")
    level = heading.partition(" ")[0]
    return re.split(rf"\n#{{2,{len(level)}}} ", after, maxsplit=1)[0]


def _joined(store: Store) -> dict[tuple[str, Recipe], list[Run]]:
    """Runs that stand in one table or curve, by sweep, if any, and recipe."""
    groups: dict[tuple[str, Recipe], list[Run]] = {}
    sweeps = [(cell.sweep, cell.run) for cell in store.cells if cell.run is not None]
    for place, run in [*(("", run) for run in store.single_runs), *sweeps]:
        if run.is_ok:
            groups.setdefault((place, run.config.recipe), []).append(run)
    return groups


def _left_out(store: Store) -> Iterator[Finding]:
    """Files that are meant to be records and are not used."""
    for file in store.left_out:
        if file.kind != "foreign":
            yield file.name, f"left out, {file.kind}: {file.reason}"


# ------------------------------------------------------------------------------ staleness


def _stale(store: Store, today: CurrentCode) -> Iterator[Finding]:
    """Why records tell nothing of today's code."""
    for name, content in measured_files(store):
        yield from ((name, f"stale: {reason}") for reason in stale_reasons(content, today))


def _marks(state: ReportState, path: Path, today: CurrentCode) -> Iterator[Finding]:
    """Whether the marks of the report are those of today."""
    if today.is_checkout and state.today != today:
        yield path.name, "its marks of what is stale are not today's; write it again"


def _about_code(today: CurrentCode) -> str:
    if not today.is_checkout:
        return f"code: {NO_CHECKOUT}"
    return "code that a recipe reaches compared with HEAD"
