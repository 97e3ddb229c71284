"""Checks that a RESULTS.md agrees with its records: `python -m scaling lint RESULTS.md`.

Its command must write the same bytes again, and the numbers of its rows and records must follow
from the raw samples: otherwise these are errors (exit code 1). Records that are stale or left out
are warnings (exit code 0).
"""

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jsonargparse

from scaling.comparison import self_test
from scaling.lint import contradictions
from scaling.lint.contradictions import Finding
from scaling.markdown import escaped
from scaling.parity import certificate as certificates
from scaling.peers import record as comparisons
from scaling.report import staleness
from scaling.report.options import ReportOptions, build_report_parser, read_report_options
from scaling.report.results_md import ABOUT_PAGE, HEADING, draw_plots, render_pages
from scaling.report.rows import rows
from scaling.report.run_formatting import TITLES
from scaling.report.store_analysis import StoreAnalysis, page_name, sweep_names
from scaling.store.conditions import differences, without_threads
from scaling.store.reader import Store, load_store
from scaling.store.run import Run
from unitransformer.config import Recipe
from unitransformer.record.units import format_count

COMMAND = ("python", "-m", "scaling", "report")
LONGEST_DIFF = 3  # lines of either side
DIFF_WIDTH = 100  # characters of a line around the first that differs
PLOT_NAME = re.compile(r"(bert|gpt|vit)-(loss|.+-by-(batch|devices))\.svg")  # of any report


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Errors and warnings, each with its place, and what was checked."""

    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    checked: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return 1 if self.errors else 0


def run_lint(given: Any) -> int:
    """Prints the findings in the report that the options name, and returns the exit code."""
    findings = lint(given.file)
    print(render(findings))
    return findings.exit_code


def render(findings: Findings) -> str:
    """Returns a line for each finding, then what was checked."""
    kinds = (("error", findings.errors), ("warning", findings.warnings))
    lines = [f"{kind}: {where}: {what}" for kind, group in kinds for where, what in group]
    counts = ", ".join(format_count(len(group), kind) for kind, group in kinds)
    return "\n".join([*lines, *findings.checked, counts])


def lint(path: Path, *, code: Path | None = None) -> Findings:
    """Checks a report against its records and the current code.

    Args:
        path: of the report; its command is read as if typed in its folder.
        code: checkout whose HEAD the records are compared with; default: that of this code.

    Raises:
        ValueError: not a file, not text, or not a report.
        OSError: it cannot be read.
    """
    text = _read(path)
    state = staleness.read_state(text)
    if state is None and not text.startswith(HEADING):
        raise ValueError(f"{path} is no report; give one that `{shlex.join(COMMAND)} DIR` wrote")
    command, previous = state or (None, staleness.NOT_COMPARED)
    typed = shlex.split(command or "")
    try:
        options = _options_in(typed, path)
        store = load_store(options.folders, relative_to=path.parent)
    except ValueError as error:
        return Findings(errors=((path.name, str(error)),), warnings=(), checked=())
    today = staleness.compare_with_today(store, code or Path(__file__).parents[2])
    proofs = format_count(len(store.certificates), "certificate")
    report_rows, ok_runs = rows(store), [run for run in store.runs if run.is_ok]
    # Compared with the code of then, as the report was; a later change is a warning of its own.
    analysis = StoreAnalysis(store, previous)
    pages = render_pages(analysis, options)
    plots = draw_plots(analysis)
    errors = [
        *_compare(pages, plots, options),
        *contradictions.check_rows(report_rows, store.successful_runs),
        *contradictions.check_efficiencies(store.successful_runs),
    ]
    warnings = [
        (file.name, f"left out, {file.kind}: {file.reason}")
        for file in store.left_out
        if file.kind != "foreign"
    ]
    warnings += _orphans(pages, plots, options)
    warnings += contradictions.find_superlinear(store.successful_runs)
    for run in ok_runs:
        errors += [(run.name, what) for what in contradictions.find_contradictions(run)]
        # Values that the current code counts differently from the code that wrote the record.
        warnings += [(run.name, what) for what in contradictions.find_recounts(run)]
    for proof in store.certificates:
        errors += [(proof.name, what) for what in certificates.find_contradictions(proof)]
    for comparison in store.comparisons:
        found = comparisons.find_contradictions(comparison)
        errors += [(comparison.name, what) for what in found]
    for test in store.self_tests:
        errors += [(test.name, what) for what in self_test.find_contradictions(test)]
    errors += _missing_notes(path, options, store)
    for name, content in staleness.measured_files(store):
        warnings += [(name, f"stale: {why}") for why in staleness.stale_reasons(content, today)]
    if today.is_checkout and previous != today:
        what = "its marks of stale records are outdated; write the report again"
        warnings.append((path.name, what))
    code_checked = "code that a recipe reaches compared with HEAD"
    return Findings(
        errors=tuple(errors),
        warnings=tuple(warnings),
        checked=(
            f"arithmetic of {format_count(len(report_rows), 'row')}",
            f"bytes of {format_count(len(pages), 'page')}",
            f"samples of {format_count(len(store.runs), 'record')}, {proofs} and "
            f"{format_count(len(store.comparisons), 'comparison')}",
            code_checked if today.is_checkout else f"code: {staleness.NO_CHECKOUT}",
        ),
    )


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a report that `scaling report` wrote")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error.reason}); give a report") from error


def _options_in(typed: Sequence[str], path: Path) -> ReportOptions:
    """Returns the options of the command that wrote the report, with paths from here."""
    if tuple(typed[: len(COMMAND)]) != COMMAND:
        raise ValueError(
            f"it does not end with its `{shlex.join(COMMAND)} DIR`; write it again with that"
        )
    try:
        given = build_report_parser().parse_args(typed[len(COMMAND) :])
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ValueError(f"its command cannot be read: {' '.join(str(error).split())}") from error
    if given.out.name != path.name:
        raise ValueError(
            f"its command writes {given.out}; name the file so, or write it again as {path.name}"
        )
    return read_report_options(given, path.parent)


def _compare(
    pages: Mapping[PurePosixPath, str], plots: Mapping[str, bytes], options: ReportOptions
) -> Iterator[Finding]:
    for name, expected in pages.items():
        file = options.out.parent / name
        if not file.is_file():
            yield str(name), "is missing; write the report again"
        elif (text := _read(file)) != expected:
            line, difference = _first_difference(text, expected)
            yield f"{name}:{line}", difference
    for plot, content in plots.items():
        where = f"{options.relative(options.plots)}/{plot}"
        if not (options.plots / plot).is_file():
            yield where, "is missing; write the report again"
        elif (options.plots / plot).read_bytes() != content:
            yield where, "is not the plot that the records give; write the report again"


def _orphans(
    pages: Mapping[PurePosixPath, str], plots: Mapping[str, bytes], options: ReportOptions
) -> Iterator[Finding]:
    """Files that an earlier report wrote, such as of a sweep that was renamed since.

    Other reports may have their own pages in the same folder, or their own plots.
    """
    names, back = {path.name for path in pages}, f"\n{ABOUT_PAGE} [{escaped(options.out.name)}]("
    for path in sorted(options.pages.glob("*.md")):
        if path.name not in names and back in path.read_text(errors="replace"):
            where = f"{options.relative(options.pages)}/{path.name}"
            yield where, "is a page of an earlier report; its numbers may not hold: delete it"
    for path in sorted(options.plots.glob("*.svg")):
        if path.name not in plots and PLOT_NAME.fullmatch(path.name):
            where = f"{options.relative(options.plots)}/{path.name}"
            yield where, "is on no page; delete it, unless another report shows it"


def _first_difference(text: str, expected: str) -> tuple[int, str]:
    """Returns the number of the first line that differs, from 1, and a short diff."""
    actual, wanted = text.split("\n"), expected.split("\n")
    changes = difflib.SequenceMatcher(None, actual, wanted, autojunk=False).get_opcodes()
    _, start, end, wanted_start, wanted_end = next(c for c in changes if c[0] != "equal")
    removed, added = actual[start:end], wanted[wanted_start:wanted_end]
    letters = zip("".join(removed[:1]), "".join(added[:1]), strict=False)
    column = next((index for index, (old, new) in enumerate(letters) if old != new), 0)
    left = max(0, column - DIFF_WIDTH // 2)
    right = left + DIFF_WIDTH
    lines = ["the text is not what its records give (-: the file, +: the records)"]
    for sign, side in (("-", removed), ("+", added)):
        for line in side[:LONGEST_DIFF]:
            before, after = "…" if left > 0 else "", "…" if right < len(line) else ""
            lines.append(f"  {sign} {before}{line[left:right]}{after}")
    return start + 1, "\n".join(lines)


def _missing_notes(path: Path, options: ReportOptions, store: Store) -> Iterator[Finding]:
    """Tables that join runs under different conditions without a note that says so."""
    # Runs that share a table or curve, by sweep ("" for none) and recipe.
    groups: dict[tuple[str, Recipe], list[Run]] = {}
    sweeps = {cell.run.name: cell.sweep for cell in store.cells if cell.run is not None}
    for run in store.successful_runs:
        groups.setdefault((sweeps.get(run.name, ""), run.config.recipe), []).append(run)
    names = sweep_names(store)
    for (sweep, recipe), runs in groups.items():
        page = options.pages / (page_name(names[sweep]) if sweep else "runs.md")
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        section = _section(text, f"## {TITLES[recipe]}")
        records = [run.record for run in runs]
        if sweep:  # the page of a sweep states that ranks that share cores have fewer threads
            records = [without_threads(record) for record in records]
        else:
            section = _section(section, "### All runs")
        section = " ".join(section.replace("\n>", " ").split())
        for line in differences(records):
            if re.split(r"(?<= differ)|:", line)[0] not in section:
                table = f"{sweep}, {TITLES[recipe]}" if sweep else TITLES[recipe]
                what = f"{len(runs)} records in one table, and nothing says: {line}"
                yield path.name, f"{table}: {what}"


def _section(text: str, heading: str) -> str:
    """The text from a heading to the next one of its level or above."""
    _, _, after = text.partition(f"\n{heading}\n")
    level = heading.partition(" ")[0]
    return re.split(rf"\n#{{2,{len(level)}}} ", after, maxsplit=1)[0]
