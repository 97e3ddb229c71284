"""Renders reports from records and reads cells back from their tables."""

import re

from scaling.report.results_md import render_report
from scaling.store.reader import Store
from tests.builders.records import make_run
from unitransformer.record.schema import Record


def make_store(*records: Record) -> Store:
    runs = tuple(make_run(record, f"runs/{i}.json") for i, record in enumerate(records))
    return Store(runs=runs, left_out=())


def render(*records: Record) -> str:
    """The report of these records."""
    return render_report(make_store(*records), command="python -m scaling report .", plots="plots")


def cells(text: str, name: str) -> list[str]:
    """The cells after `name` in the first table row that begins with it."""
    (row, *_) = [line for line in text.splitlines() if re.match(rf"\| {re.escape(name)} ", line)]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[2:-1]]
