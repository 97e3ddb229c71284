"""The parameter summary: every module down to a layer's parts, with its count of numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tabulate import DataRow, TableFormat, tabulate

DEPTH = 3  # transformer_layers.0.mha: three names deep
BYTES_PER_PARAMETER = 4  # the size is that of float32 weights

_ROW = DataRow("", " | ", "")
_LAYOUT = TableFormat(
    lineabove=None,
    linebelowheader=None,
    linebetweenrows=None,
    linebelow=None,
    headerrow=_ROW,
    datarow=_ROW,
    padding=0,
    with_header_hide=None,
)


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    name: str
    type: str
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    rows: tuple[SummaryRow, ...]
    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    @property
    def size_mb(self) -> float:
        """Weights in float32, in units of 10^6 bytes."""
        return self.total * BYTES_PER_PARAMETER / 1e6


def summarise(network: Any) -> Summary:
    """Count a `torch.nn.Module`, on any device (meta too). A shared parameter counts once in the
    totals and in each of the modules that use it."""
    rows = tuple(
        SummaryRow(
            name=name,
            type=type(module).__name__,
            num_parameters=sum(p.numel() for p in module.parameters()),
        )
        for name, module in _modules(network)
    )
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    return Summary(rows=rows, trainable=trainable, frozen=total - trainable)


def render_summary(summary: Summary) -> str:
    """The table as plain text, in the layout Lightning made familiar."""
    cells = [
        (index, row.name, row.type, human_count(row.num_parameters))
        for index, row in enumerate(summary.rows)
    ]
    headers = ("", "Name", "Type", "Params")
    header, *body = tabulate(
        cells, headers=headers, tablefmt=_LAYOUT, stralign="left", disable_numparse=True
    ).splitlines()
    rule = "-" * len(header)
    totals = [
        (human_count(summary.trainable), "Trainable params"),
        (human_count(summary.frozen), "Non-trainable params"),
        (human_count(summary.total), "Total params"),
        (f"{summary.size_mb:,.3f}", "Total estimated model params size (MB)"),
    ]
    width = max(10, *(len(figure) + 1 for figure, _ in totals))
    foot = [f"{figure:<{width}}{words}" for figure, words in totals]
    return "\n".join([header, rule, *body, rule, *foot])


def human_count(number: int) -> str:
    """Three digits and a unit: 0, 256, 66.0 K, 5.1 M, 1.3 B, 174 B.

    Lightning's rounding: the number is shown with one decimal below a hundred of its unit.
    """
    value, unit = float(number), ""
    for unit in ("", "K", "M", "B", "T"):
        if value < 1000 or unit == "T":
            break
        value /= 1000
    if not unit:
        return str(number)
    return f"{int(value)} {unit}" if value >= 100 else f"{value:.1f} {unit}"


def _modules(network: Any) -> Iterator[tuple[str, Any]]:
    for name, module in network.named_modules():
        if name and name.count(".") < DEPTH:
            yield name, module
