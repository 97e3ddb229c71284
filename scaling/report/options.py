"""The options of `python -m scaling report`, and the command that writes the same report again."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unitransformer.cli import Parser

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

    def relative(self, path: Path) -> str:
        """Returns a path from the folder of RESULTS.md."""
        from scaling.store.reader import relative_name

        name = relative_name(path, self.out.parent)
        return f"./{name}" if name.startswith("~") else name  # no user's home

    @property
    def command(self) -> str:
        """The command that writes the same file again, typed in the folder of the file."""
        arguments = ["report", *map(self.relative, self.folders)]
        for name, path, default in (
            ("out", self.out.name, DEFAULT_OUT),
            ("plots", self.relative(self.plots), DEFAULT_PLOTS),
            ("pages", self.relative(self.pages), DEFAULT_PAGES.format(self.out.stem)),
        ):
            arguments += [f"--{name}", path] if path != default else []
        return f"python -m scaling {shlex.join(arguments)}"


def build_report_parser() -> Parser:
    parser = Parser(
        description="Write RESULTS.md, its pages and plots from the run records below folders.",
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


def read_report_options(given: Any, folder: Path = Path()) -> ReportOptions:
    """Returns the parsed options; `folder` is where the command is typed."""
    paths = {name: given[name] for name in ("plots", "pages", "html", "csv", "json")}
    paths["plots"] = paths["plots"] or given.out.parent / DEFAULT_PLOTS
    paths["pages"] = paths["pages"] or given.out.parent / DEFAULT_PAGES.format(given.out.stem)
    return ReportOptions(
        folders=tuple(folder / path for path in given.folders),
        out=folder / given.out,
        **{name: path and folder / path for name, path in paths.items()},
    )
