"""Summarizes the parameters of a network: every module down to the parts of a layer."""

from dataclasses import dataclass
from typing import Any

DEPTH = 3  # names of modules such as transformer_layers.0.mha
BYTES_PER_PARAMETER = 4  # in float32


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    name: str
    type: str
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class ParameterSummary:
    rows: tuple[SummaryRow, ...]
    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    @property
    def size_mb(self) -> float:
        """Size of the weights in float32, in units of 10^6 bytes."""
        return self.total * BYTES_PER_PARAMETER / 1e6


def summarize(network: Any) -> ParameterSummary:
    """Counts the parameters of a `torch.nn.Module` on any device, also on meta.

    A shared parameter counts once in the totals and in each of the modules that use it.
    """
    rows = tuple(
        SummaryRow(
            name=name,
            type=type(module).__name__,
            num_parameters=sum(p.numel() for p in module.parameters()),
        )
        for name, module in network.named_modules()
        if name and name.count(".") < DEPTH
    )
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    return ParameterSummary(rows=rows, trainable=trainable, frozen=total - trainable)


def render_summary(summary: ParameterSummary) -> str:
    """Returns the table as text, in Lightning's layout."""
    cells = [("", "Name", "Type", "Params")]
    for index, row in enumerate(summary.rows):
        cells.append((str(index), row.name, row.type, human_count(row.num_parameters)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    header, *body = (" | ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    rule = "-" * len(header)
    totals = [
        (human_count(summary.trainable), "Trainable params"),
        (human_count(summary.frozen), "Non-trainable params"),
        (human_count(summary.total), "Total params"),
        (f"{summary.size_mb:,.3f}", "Total estimated model params size (MB)"),
    ]
    width = max(10, *(len(number) + 1 for number, _ in totals))
    foot = [f"{number:<{width}}{label}" for number, label in totals]
    return "\n".join([header, rule, *body, rule, *foot])


def human_count(number: int) -> str:
    """Formats three digits and a unit: 0, 256, 66.0 K, 5.1 M, 1.3 B, 174 B.

    As Lightning does, it shows one decimal below a hundred of the unit, and truncates above.
    """
    if number < 1000:
        return str(number)
    value, unit = number / 1000, "K"
    for larger in ("M", "B", "T"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{int(value)} {unit}" if value >= 100 else f"{value:.1f} {unit}"
