"""Renders reports from records and reads cells back from their tables."""

import re
from collections.abc import Sequence
from pathlib import Path

from scaling.analysis.efficiency import find_scatters
from scaling.report.options import ReportOptions
from scaling.report.results_md import render_pages
from scaling.report.store_analysis import StoreAnalysis, SweepOfRecipe, sorted_cells
from scaling.store.reader import Cell, Store
from tests.builders.records import make_run
from unitransformer.record.schema import Record

OPTIONS = ReportOptions(
    folders=(Path(),), out=Path("RESULTS.md"), plots=Path("plots"), pages=Path("pages")
)


def make_store(*records: Record) -> Store:
    runs = tuple(make_run(record, f"runs/{i}.json") for i, record in enumerate(records))
    return Store(runs=runs, left_out=())


def pages_of(store: Store) -> dict[str, str]:
    """All pages by file name; those other than RESULTS.md are in the folder `pages`."""
    pages = render_pages(StoreAnalysis(store), OPTIONS)
    return {path.name: text for path, text in pages.items()}


def text_of(store: Store) -> str:
    """The text of all pages, RESULTS.md first."""
    return "\n".join(pages_of(store).values())


def render(*records: Record) -> str:
    """The text of all pages of these records."""
    return text_of(make_store(*records))


def results(*records: Record) -> str:
    """RESULTS.md of these records, without the other pages."""
    return pages_of(make_store(*records))["RESULTS.md"]


def sweep_of(cells: Sequence[Cell]) -> SweepOfRecipe:
    """A sweep named s of these cells of GPT alone."""
    scatters = find_scatters(cell.run for cell in cells if cell.run is not None)
    return SweepOfRecipe(recipe="gpt", name="s", cells=sorted_cells(cells), scatters=scatters)


def cells(text: str, name: str) -> list[str]:
    """The cells after `name` in the first table row that begins with it."""
    (row, *_) = [line for line in text.splitlines() if re.match(rf"\| {re.escape(name)} ", line)]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[2:-1]]
