"""Draws tables: columns of what differs, a sentence on what is the same, notes with row numbers."""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence

from scaling.markdown import escaped, note, table
from scaling.report.run_formatting import shape, without_paths
from scaling.store.conditions import differences
from scaling.store.run import Run
from unitransformer.config import RunConfig, flat_dict
from unitransformer.record.schema import Record

# Settings that are shown whenever they differ, in this order.
SETTINGS = {
    "size": "size",
    "parallel.accelerator": "accelerator",
    "parallel.precision": "precision",
    "parallel.num_nodes": "nodes",
    "parallel.compile": "compile",
    "parallel.activation_checkpointing": "checkpointing",
    "parallel.cpu_offload": "offloaded to the host",
}
SAME = "Same in all rows: "
PLAIN = ("1", "off", "no")  # values that are not worth a word where all rows have them
LONGEST_DIFFERENCE = 400  # characters

Columns = dict[str, list[str]]  # cells of each, by its heading
Remark = tuple[str, int]  # a text, and the number of the row it belongs to


@functools.cache
def settings_of(config: RunConfig) -> Mapping[str, str]:
    """Returns every setting as text, by its dotted name."""
    words = {True: "yes", False: "no", None: "none"}
    settings = {
        name: words[value] if value is None or isinstance(value, bool) else str(value)
        for name, value in flat_dict(config).items()
    }
    # A size may have been changed field by field: its name would be wrong, its shape is not.
    return settings | {"size": shape(config.model)}


def distinguishing(configs: Sequence[RunConfig], ignored: Collection[str]) -> Columns:
    """Returns the settings in which configs differ, by dotted name: `SETTINGS`, and of the others
    only as many as distinguish all configs."""
    numbers = {config: number for number, config in enumerate(dict.fromkeys(configs))}
    settings = [settings_of(config) for config in numbers]
    columns: Columns = {}
    places = [numbers[config] for config in configs]
    groups: list[tuple[str, ...]] = [()] * len(settings)
    for field in (*SETTINGS, *(name for name in settings[0] if name not in SETTINGS)):
        values = [setting[field] for setting in settings]
        if field in ignored or len(set(values)) == 1:
            continue
        finer = [(*group, value) for group, value in zip(groups, values, strict=True)]
        if field in SETTINGS or len(set(finer)) > len(set(groups)):
            columns[field] = [without_paths(values[place], []) for place in places]
            groups = finer
    return columns


def differing(configs: Sequence[RunConfig], ignored: Collection[str]) -> Columns:
    """As `distinguishing`, with headings and cells for a table."""
    return {
        SETTINGS.get(field, field): [escaped(value) for value in values]
        for field, values in distinguishing(configs, ignored).items()
    }


def setting_name(field: str) -> str:
    return SETTINGS.get(field, field.rpartition(".")[2].replace("_", " "))


def shared(configs: Sequence[RunConfig], ignored: Collection[str]) -> str:
    """Returns a sentence on the settings that are the same in all rows, if there are any."""
    parts = []
    for field, name in SETTINGS.items():
        values = {settings_of(config)[field] for config in configs}
        if field not in ignored and len(values) == 1 and not values & set(PLAIN):
            parts.append(f"{name} {escaped(*values)}")
    return f"All rows: {', '.join(parts)}." if parts else ""


def draw(rows: Sequence[Mapping[str, str]], always: Collection[str] = ()) -> list[str]:
    """Draws a table, and before it a sentence on the columns that are the same in all its rows.

    Args:
        rows: cells by heading; empty columns are left out.
        always: columns that stay in the table if they are the same.
    """
    drawn: Columns = {}
    same = []
    for heading in dict.fromkeys(heading for row in rows for heading in row):
        cells = [row.get(heading, "") for row in rows]
        if len(rows) > 1 and heading not in always and len(set(cells)) == 1 and cells[0]:
            same.append(f"{heading} {cells[0]}")
        elif any(cells):
            drawn[heading] = cells
    blocks = [f"{SAME}{'; '.join(same)}."] if same else []
    return [*blocks, table(tuple(drawn), zip(*drawn.values(), strict=True))]


def notes(remarks: Iterable[Remark], num_rows: int) -> str:
    """Returns a list of the remarks, each once with the rows it belongs to."""
    return list_of({text: rows_of(rows, num_rows) for text, rows in _grouped(remarks).items()})


def list_of(places: Mapping[str, str]) -> str:
    """Returns a list of texts with their places; those equal up to a colon share a line."""
    lines: dict[str, list[str]] = {}
    for text, place in places.items():
        begin, colon, rest = text.partition(": ")
        lines.setdefault(f"{begin[0].upper()}{begin[1:]}{colon}", []).append(f"{rest} ({place})")
    return "\n".join(f"- {begin}{'; '.join(rest)}." for begin, rest in sorted(lines.items()))


def _grouped(remarks: Iterable[Remark]) -> dict[str, list[int]]:
    rows: dict[str, dict[int, None]] = {}
    for text, number in remarks:
        rows.setdefault(text, {})[number] = None
    return {text: list(numbers) for text, numbers in rows.items()}


def rows_of(numbers: Sequence[int], num_rows: int, thing: str = "row") -> str:
    """Writes ascending numbers as text, such as rows 1 to 3, 5."""
    if len(numbers) == num_rows > 1:
        return f"all {thing}s"
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    parts = [
        f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans
    ]
    return f"{thing}{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


def different_conditions(
    remarks: Iterable[Remark], num_rows: int, order: str, thing: str = "row"
) -> list[str]:
    """Returns a box with the conditions in which the records of a row differ, if any do.

    Args:
        order: how the records of a row are numbered.
    """
    head = f"Measured under different conditions; records are numbered {order}."
    grouped = _grouped(remarks)
    return note(head, [f"{rows_of(rows, num_rows, thing)}: {t}" for t, rows in grouped.items()])


def condition_lines(lines: Iterable[str], runs: Sequence[Run]) -> list[str]:
    """Returns the lines of `differences` of these runs for a page."""
    every = f"(records {', '.join(str(number) for number in range(1, len(runs) + 1))})"
    return [escaped(without_paths(line, []).replace(every, "(all records)")) for line in lines]


def conditions_of_rows(records: Sequence[Record]) -> list[str]:
    """Returns a box with the conditions in which the rows of a table differ, if any do."""
    shown = []
    for line in (without_paths(line, []) for line in differences(records)):
        end = "…" if line[LONGEST_DIFFERENCE:] else ""
        shown.append(escaped(f"{line[:LONGEST_DIFFERENCE]}{end}"))
    return note("These rows were measured under different conditions.", shown)
