"""Reads published runs from a CSV file; a figure that the source does not state is None."""

import csv
import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

BUILTIN_ROWS = Path(__file__).with_name("runs.csv")
COLUMNS = shlex.split(
    "source model params layers d_model heads vocab seq_len gpus gpu_type strategy precision "
    "micro_batch global_batch ac compile tokens_per_s_per_gpu mfu tflops_per_gpu peak_mem_gib url"
)
MISSING = ("", "not stated")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One run as its source prints it. Rates are per GPU."""

    source: str
    note: str  # which figures are derived or assumed
    url: str
    model: str
    parameters: int | None
    is_rounded: bool  # `parameters` is a name such as 175B, not a count
    num_layers: int | None
    width: int | None  # channels of the residual stream
    num_heads: int | None
    num_kv_heads: int | None  # heads of keys and values, if the row states them
    vocabulary: int | None
    sequence_length: int | None  # tokens
    num_gpus: int
    gpu: str
    strategy: str
    precision: str | None
    micro_batch: int | None  # samples per GPU and forward pass
    global_batch: int | None  # samples per optimizer step, all GPUs together
    activation_checkpointing: str | None
    is_compiled: bool | None
    tokens_per_s: float | None
    mfu: float | None  # as printed, under the convention of the source; 0.5 means 50 %
    flops_per_s: float | None  # as printed, likewise
    peak_bytes: int | None


def load_rows(path: Path | None = None) -> tuple[PublishedRow, ...]:
    """Returns the built-in rows, or those of another file with the same columns.

    Raises ValueError for a missing column or a cell that cannot be read, with file, line and field.
    """
    path = BUILTIN_ROWS if path is None else path
    if not path.is_file():
        raise ValueError(f"rows {path} is not a file; check the path")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise ValueError(
                    f"column {missing[0]} is missing{more}; the first line has to be "
                    f"{','.join(COLUMNS)}"
                )
            # A quoted cell may span lines: line_num is the line a row ends on.
            rows = tuple(_row_at(reader.line_num, cells) for cells in reader)
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: no row below the header; give a file with published runs")
    return rows


def _row_at(line: int, cells: Mapping[str | None, str | None]) -> PublishedRow:
    try:
        if None in cells:
            raise ValueError("more cells than columns; quote cells that hold commas")
        return _row({column: (cells[column] or "").strip() for column in COLUMNS})
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from error


def _row(cells: Mapping[str, str]) -> PublishedRow:
    source, _, note = _required(cells, "source").partition(" (")
    _required(cells, "gpus")
    num_gpus = _read(cells, "gpus", _count)
    assert num_gpus is not None
    heads, kv_heads = _read(cells, "heads", _heads) or (None, None)
    parameters = _read(cells, "params", _parameters)
    return PublishedRow(
        source=source,
        note=note.removesuffix(")"),
        url=_required(cells, "url"),
        model=_required(cells, "model"),
        parameters=parameters,
        is_rounded=parameters is not None and not cells["params"].isdigit(),
        num_layers=_read(cells, "layers", _count),
        width=_read(cells, "d_model", _count),
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocabulary=_read(cells, "vocab", _count),
        sequence_length=_read(cells, "seq_len", _count),
        num_gpus=num_gpus,
        gpu=_required(cells, "gpu_type"),
        strategy=cells["strategy"],
        precision=_read(cells, "precision", str),
        micro_batch=_read(cells, "micro_batch", _count),
        global_batch=_read(cells, "global_batch", _count),
        activation_checkpointing=_read(cells, "ac", str),
        is_compiled=_read(cells, "compile", _yes_or_no),
        tokens_per_s=_read(cells, "tokens_per_s_per_gpu", _positive),
        mfu=_read(cells, "mfu", _share),
        flops_per_s=_read(cells, "tflops_per_gpu", lambda text: _positive(text) * 1e12),
        peak_bytes=_read(cells, "peak_mem_gib", lambda text: round(_positive(text) * 2**30)),
    )


def _read(cells: Mapping[str, str], column: str, reader: Callable[[str], T]) -> T | None:
    text = cells[column]
    if text in MISSING:
        return None
    try:
        return reader(text)
    except ValueError as error:
        raise ValueError(f"{column} is {text!r}; {error}") from error


def _required(cells: Mapping[str, str], column: str) -> str:
    if cells[column] in MISSING:
        raise ValueError(f"{column} is {cells[column]!r}; every row needs it")
    return cells[column]


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise ValueError("it must be a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    number = float(text) if re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", text) else math.nan
    if not 0 < number < math.inf:
        raise ValueError("it must be a number above 0, in digits")
    return number


def _share(text: str) -> float:
    number = _positive(text)
    if number > 1:
        raise ValueError("it is a share of the peak and cannot be above 1; divide per cent by 100")
    return number


def _parameters(text: str) -> int:
    """Reads a count, or one rounded to a name such as 1.7B or 350M."""
    named = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([BM])", text)
    if not named:
        return _count(text)
    return round(float(named[1]) * (1e9 if named[2] == "B" else 1e6))


def _heads(text: str) -> tuple[int, int | None]:
    """Reads 32, or 32 (8 kv) if fewer heads hold keys and values."""
    found = re.fullmatch(r"([0-9]+)(?: \(([0-9]+) kv\))?", text)
    if not found:
        raise ValueError("write it as 32, or as 32 (8 kv)")
    return _count(found[1]), _count(found[2]) if found[2] else None


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("it must be yes or no")
    return text == "yes"
