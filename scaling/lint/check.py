"""RESULTS.md goes in; what is wrong with it comes out. `python -m scaling lint RESULTS.md`.

Three questions. Does its own command write it again, byte by byte? Does the arithmetic of the
printed figures and of the records hold? Are the records older than the code? The first two give
errors (exit code 1), the last one warnings (exit code 0).
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import jsonargparse

from scaling.lint.table_arithmetic import Table, check_tables, read_tables
from scaling.lint.text_diff import first_difference
from scaling.markdown import count
from scaling.parity import certificate as certificates
from scaling.report.options import (
    ReportOptions,
    build_report_parser,
    read_report_options,
    report_command,
)
from scaling.report.results_md import draw_plots, render_report
from scaling.report.run_formatting import TITLES
from scaling.report.sections.sweep import heading
from scaling.report.staleness import (
    DECISIVE,
    NO_CHECKOUT,
    Today,
    contents,
    look,
    read_today,
    stale_reasons,
)
from scaling.report.sweep_names import sweep_names
from scaling.store.conditions import differences, without_threads
from scaling.store.reader import Store, load_store, relative_name
from scaling.store.run import Run, find_contradictions
from unitransformer.config import Recipe
from unitransformer.machine.host import available_cores
from unitransformer.record.fields import NUMBER, Kinds, check_fields

COMMAND = ("python", "-m", "scaling", "report")
PASSPORT: dict[str, Kinds] = {
    "convention": str,
    "flops_per_unit": NUMBER,
    "flops_per_s": (*NUMBER, NoneType),
    "utilisation": (*NUMBER, NoneType),
    "share_of_ceiling": (*NUMBER, NoneType),
    "flag": (str, NoneType),
}
TOLERANCE = 1e-6  # relative; figures of a record are quotients of one another

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
    tables = list(read_tables(text))
    errors = [(f"{path.name}:{line}", told) for line, told in check_tables(tables)]
    options = _options_in(text, path)
    if isinstance(options, str):
        return Findings(
            errors=((path.name, options), *errors), warnings=(), checked=(_looked_at(tables),)
        )
    try:
        store = load_store(options.folders, relative_to=path.parent, processes=available_cores())
    except ValueError as error:
        return Findings(
            errors=((path.name, str(error)), *errors), warnings=(), checked=(_looked_at(tables),)
        )
    today = look(store, code or Path(__file__).parents[2])
    return Findings(
        errors=(
            *_compare(text, path, options, store),
            *errors,
            *_contradictions(store),
            *_curves(text, path, store),
        ),
        warnings=(*_left_out(store), *_stale(store, today), *_marks(text, path, today)),
        checked=(_looked_at(tables), _records_looked_at(store), _about_code(today)),
    )


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a report that `scaling report` wrote")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error.reason}); give a report") from error


def _looked_at(tables: Sequence[Table]) -> str:
    return f"arithmetic of {count(len(tables), 'printed table')}"


def _records_looked_at(store: Store) -> str:
    proofs = count(len(store.certificates), "certificate")
    return f"bytes and arithmetic against {count(len(store.runs), 'record')} and {proofs}"


# ------------------------------------------------------------------------------ the same bytes


def _options_in(text: str, path: Path) -> ReportOptions | str:
    """Places of the command in the first code block, or what is wrong with it."""
    block = re.search(r"^(`{3,})sh\n(.*?)\n\1$", text, flags=re.MULTILINE | re.DOTALL)
    how = f"its first code block holds no `{shlex.join(COMMAND)} DIR`; write it again with that"
    if block is None:
        return how
    words = shlex.split(block[2].strip()) if block[2].count("\n") == 0 else []
    if tuple(words[: len(COMMAND)]) != COMMAND:
        return how
    try:
        given = read_report_options(build_report_parser().parse_args(words[len(COMMAND) :]))
    except (jsonargparse.ArgumentError, ValueError) as error:
        return f"its command cannot be read: {' '.join(str(error).split())}"
    if given.out.name != path.name:
        return f"its command writes {given.out}; name the file so, or write it again as {path.name}"
    return ReportOptions(
        folders=tuple(path.parent / folder for folder in given.folders),
        out=path.parent / given.out,
        plots=path.parent / given.plots,
    )


def _compare(text: str, path: Path, options: ReportOptions, store: Store) -> Iterator[Finding]:
    """Where the text and the plots are not what the records give today."""
    plots = relative_name(options.plots, options.out.parent)
    # Held against what it was held against then: code that has changed since is another finding.
    again = render_report(
        store, command=report_command(options), plots=plots, today=read_today(text)
    )
    if text != again:
        line, told = first_difference(text, again)
        yield f"{path.name}:{line}", told
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
            yield from ((run.name, told) for told in _passport(run))
    for certificate in store.certificates:
        for told in certificates.find_contradictions(certificate):
            yield certificate.name, told


def _passport(run: Run) -> Iterator[str]:
    """What its stored rows and its stored rate say of one another."""
    rate, rows = run.record.get(f"{run.unit}s_per_s"), run.record.get("passport")
    if not isinstance(rows, list):
        yield f"passport is {rows!r}; it must be a list"
        return
    for index, row in enumerate(rows):
        try:
            check_fields(row, PASSPORT, f"passport.{index}")
        except ValueError as error:
            yield str(error)
        else:
            yield from _row(row, rate, run)


def _row(row: Mapping[str, Any], rate: float | None, run: Run) -> Iterator[str]:
    """Args: rate: stored, of all devices; it has been compared with the samples."""
    where, devices = f"passport.{row['convention']}", run.config.parallel.world_size
    of_device, of_unit = row["flops_per_s"], row["flops_per_unit"]
    if rate is not None and of_device is not None:
        asked = rate * of_unit
        if not math.isclose(of_device * devices, asked, rel_tol=TOLERANCE):
            yield (
                f"{where}.flops_per_s is {of_device:.4g} on each of {count(devices, 'device')}; "
                f"{rate:.4g} {run.unit}s a second of {of_unit:.4g} FLOP are {asked:.4g} together"
            )
    if (row["utilisation"] or 0) > 1:
        yield f"{where}.utilisation is {row['utilisation']:.3f}, above 1"
    if (row["share_of_ceiling"] or 0) > 1 and not row["flag"]:
        yield f"{where}.share_of_ceiling is {row['share_of_ceiling']:.3f}, above 1 without a flag"


def _curves(text: str, path: Path, store: Store) -> Iterator[Finding]:
    """Rows that were not measured alike, and a section that does not say so."""
    names = sweep_names(store)
    for (sweep, recipe), runs in _joined(store).items():
        section = _section(text, f"## {TITLES[recipe]}")
        records = [run.record for run in runs]
        section = _section(section, heading(names[sweep]) if sweep else "### All runs")
        if sweep:
            # Ranks that share cores have fewer threads: the section on scaling tells it.
            records = [without_threads(record) for record in records]
        for line in differences(records):
            field = re.split(r"(?<= differ)|:", line)[0]
            if field not in section:
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


def _stale(store: Store, today: Today) -> Iterator[Finding]:
    """Why records tell nothing of today's code."""
    for name, content in contents(store):
        yield from ((name, f"stale: {reason}") for reason in stale_reasons(content, today))


def _marks(text: str, path: Path, today: Today) -> Iterator[Finding]:
    """Whether the marks of the report are those of today."""
    if today.is_checkout and read_today(text) != today:
        yield path.name, "its marks of what is stale are not today's; write it again"


def _about_code(today: Today) -> str:
    if not today.is_checkout:
        return f"code: {NO_CHECKOUT}"
    return f"code of {' and '.join(DECISIVE)} compared with HEAD"
