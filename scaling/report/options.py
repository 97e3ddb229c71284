"""The options of the report: words in, places out; and from places the words again."""

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
    """Places, as a person wrote them."""

    folders: tuple[Path, ...]
    out: Path
    plots: Path
    pages: Path
    html: Path | None = None
    csv: Path | None = None
    json: Path | None = None


def build_report_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description="Write RESULTS.md and its plots from the run records below folders.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders that hold run records"
    )
    parser.add_argument("--out", type=Path, default=Path(DEFAULT_OUT), help="file to write")
    parser.add_argument(
        "--plots",
        type=Path | None,
        default=None,
        metavar="DIR",
        help="folder of the plots; by default plots beside the file",
    )
    parser.add_argument(
        "--pages",
        type=Path | None,
        default=None,
        metavar="DIR",
        help="folder of the pages with all details; by default RESULTS-pages beside RESULTS.md",
    )
    for name, what in (
        ("html", "one page with everything in it: tables that sort, plots that zoom"),
        ("csv", "every row, for a spreadsheet"),
        ("json", "every row, for a program"),
    ):
        parser.add_argument(f"--{name}", type=Path | None, default=None, metavar="FILE", help=what)
    return parser


def read_report_options(given: Any) -> ReportOptions:
    plots = given.out.parent / DEFAULT_PLOTS if given.plots is None else given.plots
    pages = given.out.parent / default_pages(given.out) if given.pages is None else given.pages
    return ReportOptions(
        folders=tuple(given.folders),
        out=given.out,
        plots=plots,
        pages=pages,
        html=given.html,
        csv=given.csv,
        json=given.json,
    )


def default_pages(out: Path) -> str:
    return DEFAULT_PAGES.format(out.stem)


def report_command(options: ReportOptions) -> str:
    """What writes the same file again from inside its folder, whoever and wherever one is."""
    out, plots = options.out, relative_name(options.plots, options.out.parent)
    folders = [relative_name(folder, out.parent) for folder in options.folders]
    words = ["report", *folders]
    if out.name != DEFAULT_OUT:
        words += ["--out", out.name]
    if plots != DEFAULT_PLOTS:
        words += ["--plots", plots]
    pages = relative_name(options.pages, out.parent)
    if pages != default_pages(out):
        words += ["--pages", pages]
    return f"python -m scaling {shlex.join(words)}"
