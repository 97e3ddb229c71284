"""Rows of a table and what is said of them, as the sections on scaling tell them.

Columns of what differs, one sentence on what is the same, and notes with the numbers of their rows.
"""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from scaling.analysis.efficiency import Estimate, MeasuredPoint
from scaling.markdown import escaped, shortened, table
from scaling.report.environment import without_places
from scaling.store.run import Run
from unitransformer.config import ModelConfig, RunConfig, flat_dict
from unitransformer.costs.flops import count_parameters
from unitransformer.record.parameter_summary import human_count
from unitransformer.record.units import count, rate_in_words

# Settings that are always told, in this order, above the table or in it.
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
MOST_DIGITS = 6  # of a ratio
LONGEST_FLAGS = 100  # letters in a table; the record has all of them
PLAIN = ("1", "off", "no")  # not worth a word where all rows are so

Columns = dict[str, list[str]]  # cells of each, by its head
Remark = tuple[str, int]  # what is said, and the number of the row it is said of


@functools.cache
def settings_of(config: RunConfig) -> Mapping[str, str]:
    """Every field by its dotted name, as words."""
    # A size may have been changed field by field: its name would be wrong, its shape never is.
    words = {name: _in_words(value) for name, value in flat_dict(config).items()}
    return words | {"size": shape_in_words(config.model)}


def shape_in_words(model: ModelConfig) -> str:
    layers = f"{count(model.num_layers, 'layer')} of width {model.width:,}"
    return f"{human_count(count_parameters(model))} parameters ({layers})"


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def differing(configs: Sequence[RunConfig], aside: Collection[str]) -> Columns:
    """Settings in which configs differ, as columns of cells."""
    return {
        SETTINGS.get(field, field): [escaped(value) for value in values]
        for field, values in telling(configs, aside).items()
    }


def telling(configs: Sequence[RunConfig], aside: Collection[str]) -> Columns:
    """Settings in which configs differ, by field, as plain words; beyond `SETTINGS` only those that
    tell apart what would look alike without them, as a model has its shape from its size."""
    settings = [settings_of(config) for config in configs]
    columns: Columns = {}
    alike: list[tuple[str, ...]] = [()] * len(configs)
    for field in (*SETTINGS, *(name for name in settings[0] if name not in SETTINGS)):
        values = [own[field] for own in settings]
        with_it = [(*own, value) for own, value in zip(alike, values, strict=True)]
        adds = len(set(with_it)) > len(set(alike))
        if field not in aside and (adds or (field in SETTINGS and len(set(values)) > 1)):
            columns[field] = [without_places(value, []) for value in values]
            alike = with_it
    return columns


def field_in_words(field: str) -> str:
    """`SETTINGS` by their names; of others the last part."""
    return SETTINGS.get(field, field.rpartition(".")[2].replace("_", " "))


def shared(configs: Sequence[RunConfig], aside: Collection[str]) -> str:
    """A sentence on the settings that are the same in all rows, if there are any."""
    told = []
    for field, name in SETTINGS.items():
        values = {settings_of(config)[field] for config in configs}
        if field not in aside and len(values) == 1 and not values & set(PLAIN):
            told.append(f"{name} {escaped(*values)}")
    return f"All rows: {', '.join(told)}." if told else ""


def speed(point: MeasuredPoint) -> str:
    """Of all launches together."""
    rate, unit = point.rate, f"{point.runs[0].unit}s"
    told = rate_in_words(rate.value, unit)
    if rate.low is None or rate.high is None:
        return told
    ends = (rate_in_words(end, "").removesuffix(" /s") for end in (rate.low, rate.high))
    return f"{told} ({' to '.join(ends)})"


def figure(estimate: Estimate, form: str) -> str:
    """With its interval if it has one; why it has none stands under the table."""
    told = form.format(estimate.value)
    if estimate.low is None or estimate.high is None:
        return told
    return f"{told} ({form.format(estimate.low)} to {form.format(estimate.high)})"


def ratio_figure(estimate: Estimate, digits: int) -> str:
    """As `figure`, with as many digits as it takes to tell the ends of the interval from 1, which
    decide whether it is a tie."""
    ends = [end for end in (estimate.low, estimate.high) if end is not None and end != 1]
    while digits < MOST_DIGITS and any(round(end, digits) == 1 for end in ends):
        digits += 1
    return figure(estimate, f"{{:.{digits}f}}")


def draw(columns: Columns, aside: Collection[str] = ()) -> list[str]:
    """A table, and before it one sentence on the columns that are the same in all its rows.

    Args:
        aside: columns that stay in the table whatever they hold.
    """
    num_rows = len(next(iter(columns.values())))
    alike = {
        head: values[0]
        for head, values in columns.items()
        if num_rows > 1 and head not in aside and len(set(values)) == 1
    }
    told = "; ".join(f"{head} {value}" for head, value in alike.items() if value)
    kept = {head: values for head, values in columns.items() if head not in alike}
    rows = table(tuple(kept), zip(*kept.values(), strict=True))
    return [f"{SAME}{told}.", rows] if told else [rows]


def notes(remarks: Iterable[Remark], num_rows: int) -> list[str]:
    """A line for each remark, with the rows it is of."""
    return lines_of({text: rows_in_words(own, num_rows) for text, own in _grouped(remarks).items()})


def lines_of(places: Mapping[str, str]) -> list[str]:
    """Lines of a list: what begins alike, up to a colon, is one of them."""
    begun: dict[str, list[str]] = {}
    for text, place in places.items():
        begin, colon, rest = text.partition(": ")
        begun.setdefault(f"{begin[0].upper()}{begin[1:]}{colon}", []).append(f"{rest} ({place})")
    return [f"- {begin}{'; '.join(rest)}." for begin, rest in sorted(begun.items())]


def _grouped(remarks: Iterable[Remark]) -> dict[str, list[int]]:
    rows: dict[str, dict[int, None]] = {}
    for text, number in remarks:
        rows.setdefault(text, {})[number] = None
    return {text: list(numbers) for text, numbers in rows.items()}


def rows_in_words(numbers: Sequence[int], num_rows: int, thing: str = "row") -> str:
    return f"all {thing}s" if len(numbers) == num_rows > 1 else numbers_in_words(numbers, thing)


def numbers_in_words(numbers: Sequence[int], thing: str = "row") -> str:
    """Ascending ones in words: rows 1 to 3, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    told = [
        f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans
    ]
    return f"{thing}{'s' * (len(numbers) > 1)} {', '.join(told)}"


def if_told(head: str, told: list[str]) -> Columns:
    return {head: told} if any(told) else {}


def flags_of(point: MeasuredPoint) -> str:
    """Of every launch, each once."""
    flags = dict.fromkeys(flag for run in point.runs for flag in run.record["flags"])
    return shortened("; ".join(map(escaped, flags)), LONGEST_FLAGS)


def unlike(
    differing_conditions: Iterable[Remark], num_rows: int, how: str, thing: str = "row"
) -> list[str]:
    """A box with the conditions that differ; nothing if none does.

    Args:
        how: in which order records are counted.
    """
    lines = [
        f"> - {rows_in_words(own, num_rows, thing)}: {text}"
        for text, own in _grouped(differing_conditions).items()
    ]
    words = f"> Measured under different conditions; records are counted {how}."
    return ["\n".join(["> [!NOTE]", words, ">", *lines])] if lines else []


def in_words(lines: Iterable[str], runs: Sequence[Run]) -> list[str]:
    every = f"(records {', '.join(str(number) for number in range(1, len(runs) + 1))})"
    return [escaped(without_places(line, []).replace(every, "(all records)")) for line in lines]
