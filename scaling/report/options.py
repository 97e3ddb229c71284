"""The options of `python -m scaling report`, and the command that writes the same report again."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse

from scaling.store.reader import relative_name

DEFAULT_OUT = "RESULTS.md"
DEFAULT_PLOTS = "plots"
DEFAULT_PAGES = "{}-pages"  # of the name of the file without its ending


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Paths as the user wrote them."""

    folders: tuple[Path, ...]
    out: Path
    plots: Path
    pages: Path
    html: Path | None = None
    csv: Path | None = None
    json: Path | None = None


def build_report_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description="Write RESULTS.md, its pages and plots from the run records below folders.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders that hold run records"
    )
    parser.add_argument("--out", type=Path, default=Path(DEFAULT_OUT), help="file to write")
    for name, metavar, text in (
        ("plots", "DIR", "folder of the plots; by default plots next to the file"),
        ("pages", "DIR", "folder of the detailed pages; by default RESULTS-pages next to it"),
        ("html", "FILE", "one page with everything: tables that sort, plots that zoom"),
        ("csv", "FILE", "every row, for a spreadsheet"),
        ("json", "FILE", "every row, for a program"),
    ):
        parser.add_argument(f"--{name}", type=Path | None, default=None, metavar=metavar, help=text)
    return parser


def read_report_options(given: Any) -> ReportOptions:
    folder = given.out.parent
    return ReportOptions(
        folders=tuple(given.folders),
        out=given.out,
        plots=folder / DEFAULT_PLOTS if given.plots is None else given.plots,
        pages=folder / _default_pages(given.out) if given.pages is None else given.pages,
        html=given.html,
        csv=given.csv,
        json=given.json,
    )


def _default_pages(out: Path) -> str:
    return DEFAULT_PAGES.format(out.stem)


def report_command(options: ReportOptions) -> str:
    """Returns the command that writes the same file again, typed in the folder of the file."""
    out = options.out
    plots, pages = (relative_name(path, out.parent) for path in (options.plots, options.pages))
    arguments = ["report", *(relative_name(folder, out.parent) for folder in options.folders)]
    if out.name != DEFAULT_OUT:
        arguments += ["--out", out.name]
    if plots != DEFAULT_PLOTS:
        arguments += ["--plots", plots]
    if pages != _default_pages(out):
        arguments += ["--pages", pages]
    return f"python -m scaling {shlex.join(arguments)}"
