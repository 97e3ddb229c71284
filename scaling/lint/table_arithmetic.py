"""The tables of a report as they are printed, and the arithmetic that must hold among their cells.

Nothing here knows how the report is made: text goes in, lines with what is wrong in them come out.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

NUMBER = r"(\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)"
UNIT = r"(?: ?(?:%|[kMGTP]?[\w/]+))?"
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
CELL = re.compile(r"(?<!\\)\|")
WITH_INTERVAL = re.compile(rf"{NUMBER}{UNIT} \({NUMBER}{UNIT} to {NUMBER}{UNIT}")
FLOPS = re.compile(rf"^{NUMBER} ([kMGTP]?)FLOP per ")
MEDIAN_STEP = re.compile(rf"^{NUMBER} ms, .*?; {NUMBER} ms to {NUMBER} ms")
BATCH = re.compile(
    rf"{NUMBER} = {NUMBER} a device(?: x {NUMBER} micro-batches)?(?: x {NUMBER} devices)?"
)
DEVICES = re.compile(rf"^(?:{NUMBER} nodes x )?{NUMBER} x ")
RATE = re.compile(rf"^{NUMBER} (?:tokens|images)/s")
FLOPS_RATE = re.compile(rf"^{NUMBER} ([kMGTP]?)FLOP/s(?: \(.*\))?$")
SHARE = re.compile(rf"^(?:MFU |HFU )?{NUMBER}%(.*)$")
FRACTION = re.compile(rf"^{NUMBER}(?: ?(%))?(?: \({NUMBER}(?: ?%)? to {NUMBER}(?: ?%)?\))?")

Wrong = tuple[int, str]  # line of the text, from 1, and what is wrong there


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, where it stands, and the heading it is under."""

    line: int  # of its header
    heading: str  # of the section, "## BERT"
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def line_of(self, row: int) -> int:
        return self.line + 2 + row

    def column(self, start: str) -> int | None:
        """The first column whose header begins so."""
        return next((i for i, name in enumerate(self.headers) if name.startswith(start)), None)

    def value(self, name: str) -> str | None:
        """The second cell of the row that begins with `name`."""
        return next((row[1] for row in self.rows if row[:1] == (name,) and len(row) > 1), None)


def read_tables(text: str) -> Iterator[Table]:
    """Every table of a Markdown text, code blocks aside."""
    heading, fence, block = "", "", list[tuple[int, str]]()
    for number, line in enumerate([*text.split("\n"), ""], 1):
        opened = re.match("`{3,}", line)
        if fence or opened:
            fence = "" if fence and line == fence else fence or (opened[0] if opened else "")
            continue
        if line.startswith("## "):
            heading = line
        if line.startswith("|"):
            block.append((number, line))
        elif block:
            yield _table(block, heading)
            block = []


def _table(block: Sequence[tuple[int, str]], heading: str) -> Table:
    cells = [tuple(cell.strip() for cell in CELL.split(line)[1:-1]) for _, line in block]
    return Table(line=block[0][0], heading=heading, headers=cells[0], rows=tuple(cells[2:]))


def check_tables(tables: Sequence[Table]) -> Iterator[Wrong]:
    """Every cell that contradicts itself or its neighbours."""
    for table in tables:
        for index, row in enumerate(table.rows):
            for told in itertools.chain(*map(_check_cell, row)):
                yield table.line_of(index), told
        yield from _check_shares(table)
        yield from _check_efficiency(table)
        yield from _check_cells(table)
    for heading, group in itertools.groupby(tables, lambda table: table.heading):
        yield from _check_rates(heading, list(group))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


# ------------------------------------------------------------------------------ one cell


def _check_cell(cell: str) -> Iterator[str]:
    for found in (*WITH_INTERVAL.finditer(cell), *MEDIAN_STEP.finditer(cell)):
        middle, low, high = map(_number, found.groups())
        if not low <= middle <= high:
            yield f"{found[0]}: {found[1]} is not between {found[2]} and {found[3]}"
    for found in BATCH.finditer(cell):
        whole, *parts = [_number(part) for part in found.groups() if part is not None]
        if math.prod(parts) != whole:
            yield f"batch: {found[0]}; its parts make {math.prod(parts):,.0f}"


# ------------------------------------------------------------------------------ shares


def _check_shares(table: Table) -> Iterator[Wrong]:
    """No share of a peak is above 1; one of a measured ceiling has its flag beside it."""
    for name, has_flag in (("share of the data sheet", False), ("share of the ceiling", True)):
        column = table.column(name)
        for index, cell in _cells(table, column):
            found = SHARE.match(cell)
            if found and _number(found[1]) > 100 and not (has_flag and ";" in found[2]):
                without = " without a flag" if has_flag else ""
                yield (
                    table.line_of(index),
                    f"{table.rows[index][0]}: {name} {cell}: above 1{without}",
                )


def _check_efficiency(table: Table) -> Iterator[Wrong]:
    """An efficiency above 1 is noise, and its interval says so, or it is wrong."""
    for column in (i for i, name in enumerate(table.headers) if "efficiency" in name.lower()):
        for index, cell in _cells(table, column):
            found = FRACTION.match(cell)
            if found is None:
                continue
            one = 100.0 if found[2] else 1.0
            least = _number(found[3] or found[1])
            if least > one:
                whose = (
                    f"its interval from {found[3]}" if found[3] else "it has no interval, and it"
                )
                yield table.line_of(index), f"efficiency {cell}: {whose} is above 1"


def _cells(table: Table, column: int | None) -> Iterable[tuple[int, str]]:
    if column is None:
        return []
    return [(index, row[column]) for index, row in enumerate(table.rows) if column < len(row)]


# ------------------------------------------------------------------------------ rates


def _check_rates(heading: str, tables: Sequence[Table]) -> Iterator[Wrong]:
    """Units a second times FLOPs a unit are the FLOP/s of a device times the devices."""
    figures = next((table for table in tables if table.value("spread over")), None)
    passport = next(
        (table for table in tables if table.column("FLOP/s a device") is not None), None
    )
    if figures is None or passport is None:
        return
    rate = RATE.match(figures.value("speed") or "")
    spread = DEVICES.match(figures.value("spread over") or "")
    flops, of_device = passport.column("FLOPs per "), passport.column("FLOP/s a device")
    if rate is None or spread is None or flops is None or of_device is None:
        return
    devices = math.prod(_number(part) for part in spread.groups() if part)
    slack = _half_digit(rate[1]) / _number(rate[1]) + 0.005  # FLOP/s are printed to three digits
    complete = [row for row in passport.rows if len(row) == len(passport.headers)]
    for index, row in enumerate(complete):
        printed = FLOPS_RATE.match(row[of_device])
        if printed is None:
            continue
        asked = _number(rate[1]) * _number(row[flops])
        given = _number(printed[1]) * PREFIXES[printed[2]] * devices
        if not math.isclose(given, asked, rel_tol=slack + 1e-9):
            yield (
                passport.line_of(index),
                f"{heading.removeprefix('## ')}: {row[0]}: {rate[0]} x {row[flops]} FLOP are "
                f"{asked:.4g} FLOP/s; {row[of_device]} x {devices:.0f} are {given:.4g}",
            )


def _check_cells(table: Table) -> Iterator[Wrong]:
    """Rows of a sweep: units a second of a device times FLOPs a unit are its FLOP/s, and times the
    devices the speed."""
    for index, row in enumerate(table.rows):
        own = dict(zip(table.headers, row, strict=False))
        speed, rate = (RATE.match(own.get(head, "")) for head in ("speed", "a device"))
        flops, given = (
            FLOPS.match(own.get("FLOPs", "")),
            FLOPS_RATE.match(own.get("FLOP/s a device", "")),
        )
        if rate is None:
            continue
        slack = _half_digit(rate[1]) / _number(rate[1])
        if flops is not None and given is not None:
            asked = _number(rate[1]) * _number(flops[1]) * PREFIXES[flops[2]]
            printed = _number(given[1]) * PREFIXES[given[2]]
            if not math.isclose(printed, asked, rel_tol=slack + 2 * 0.005):  # of three digits both
                yield (
                    table.line_of(index),
                    f"{rate[0]} x {own['FLOPs']} are {asked:.4g} FLOP/s; {given[0]} is printed",
                )
        if speed is not None:
            devices = _devices(own) or round(_number(speed[1]) / _number(rate[1]))
            own_slack = slack + _half_digit(speed[1]) / _number(speed[1])
            if not math.isclose(_number(speed[1]), _number(rate[1]) * devices, rel_tol=own_slack):
                yield (
                    table.line_of(index),
                    f"{rate[0]} on each of {devices} devices; {speed[0]} is printed",
                )


def _devices(row: Mapping[str, str]) -> int | None:
    """By the columns of the axes; None where devices are no axis."""
    if not row.get("devices", "").isdecimal():
        return None
    nodes = row.get("num-nodes", "1")
    return int(row["devices"]) * int(nodes) if nodes.isdecimal() else None


def _half_digit(number: str) -> float:
    """Half a unit of the last digit that is printed."""
    return 0.5 * 10.0 ** -len(number.partition(".")[2])
