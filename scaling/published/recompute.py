"""Recomputes the figures of published runs and names those that contradict each other.

Rules depend on the shape of a model and the convention of a source, never on a single row.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from scaling.published.conventions import Source, flops_per_token, peak_of, shape_of, source_of
from scaling.published.csv_rows import PublishedRow

# Tokens/s are printed cut or rounded too: one token/s of 865 is 0.12 %.
TOLERANCE = 0.003
# With the same work per GPU, more GPUs do not make a GPU faster. Consistent rows of one set-up lie
# within 1 % of that; 10 % leaves room for an unlucky launch.
SCALING_TOLERANCE = 0.10

Figure = Literal["MFU", "TFLOP/s", "parameters"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A printed figure and the same figure recomputed from the rest of the row."""

    figure: Figure
    printed: float
    recomputed: float
    lowest: float  # the range of values that print like this
    highest: float

    @property
    def difference(self) -> float:
        """The relative difference of the printed from the recomputed figure."""
        return self.printed / self.recomputed - 1

    @property
    def excess(self) -> float:
        """The relative difference, without sign, that rounding does not explain."""
        beyond = max(self.lowest - self.recomputed, self.recomputed - self.highest, 0.0)
        return beyond / self.recomputed

    @property
    def is_consistent(self) -> bool:
        return self.excess <= (0.0 if self.figure == "parameters" else TOLERANCE)


@dataclass(frozen=True, kw_only=True)
class RecomputedRow:
    """A row, its recomputed figures, and its contradictions."""

    row: PublishedRow
    source: Source | None
    checks: tuple[Check, ...]
    num_larger: int  # rows with more GPUs and the same work per GPU that it was compared with
    flags: tuple[str, ...]  # empty: nothing that was compared contradicts it
    left_out: str  # why a figure is not compared; empty if all are


def recompute_rows(rows: Sequence[PublishedRow]) -> tuple[RecomputedRow, ...]:
    """Recomputes each row and compares it with the others of its set-up."""
    larger, recomputed = _same_work_on_more_gpus(rows), []
    for i, row in enumerate(rows):
        source, others = source_of(row), larger.get(i, [])
        checks = tuple(_checks(row, source))
        flags = [_describe(check) for check in checks if not check.is_consistent]
        result = RecomputedRow(
            row=row,
            source=source,
            checks=checks,
            num_larger=len(others),
            flags=(*flags, *_slower_than(row, others)),
            left_out=_why_left_out(row, source, {check.figure for check in checks}),
        )
        recomputed.append(result)
    return tuple(recomputed)


def _checks(row: PublishedRow, source: Source | None) -> Iterable[Check]:
    """Parameters, TFLOP/s from tokens/s, and MFU from tokens/s or, without those, from TFLOP/s."""
    shape = shape_of(row)
    if row.parameters and not row.is_rounded and shape and shape.parameters:
        printed, recomputed = float(row.parameters), float(shape.parameters)
        limits = {"lowest": printed, "highest": printed}
        yield Check(figure="parameters", printed=printed, recomputed=recomputed, **limits)
    if source is None:
        return
    rate = _flops_per_s(row, source)
    if row.flops_per_s and rate:
        step = 1e12 * 10.0**-source.flops_digits
        cut = 0.0 if source.cuts_flops else step / 2
        yield Check(
            figure="TFLOP/s",
            printed=row.flops_per_s,
            recomputed=rate,
            lowest=row.flops_per_s - cut,
            highest=row.flops_per_s - cut + step,
        )
    rate, peak = rate or row.flops_per_s, peak_of(row, source)
    if row.mfu and rate and peak:
        half = 10.0**-source.mfu_digits / 2
        yield Check(
            figure="MFU",
            printed=row.mfu,
            recomputed=rate / peak,
            lowest=row.mfu - half,
            highest=row.mfu + half,
        )


def _flops_per_s(row: PublishedRow, source: Source) -> float | None:
    if source.convention is None or row.tokens_per_s is None:
        return None
    per_token = flops_per_token(row, source.convention)
    return None if per_token is None else per_token * row.tokens_per_s


def _why_left_out(row: PublishedRow, source: Source | None, done: set[Figure]) -> str:
    printed: dict[Figure, float | None] = {"MFU": row.mfu, "TFLOP/s": row.flops_per_s}
    left = [figure for figure, value in printed.items() if value and figure not in done]
    if not left:
        return ""
    what = " and ".join(left)
    if source is None:
        return f"{what}: no convention is known for {row.source}"
    if source.convention is None:
        return f"{what}: the convention of {row.source} is not known"
    if row.tokens_per_s is None:
        return f"{what}: the row has no tokens/s"
    if flops_per_token(row, source.convention) is None:
        return f"{what}: the shape of {row.model} is not known"
    return f"{what}: {row.source} names no peak for {row.gpu} in {row.precision}"


def _describe(check: Check) -> str:
    if check.figure == "parameters":
        return f"{check.printed:,.0f} parameters, and its shape has {check.recomputed:,.0f}"
    scale, form = (1e12, ",.1f") if check.figure == "TFLOP/s" else (1.0, ".4f")
    printed, recomputed = check.printed / scale, check.recomputed / scale
    return (
        f"{check.figure} {printed:{form}} is printed and {recomputed:{form}} follows from the rest "
        f"of the row, {abs(check.difference):.1%} {'below' if check.difference < 0 else 'above'}"
    )


def _same_work_on_more_gpus(rows: Sequence[PublishedRow]) -> dict[int, list[PublishedRow]]:
    """Returns, by index of a row, the rows with more GPUs and the same work per GPU."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row.tokens_per_s and row.micro_batch and row.global_batch:
            groups[_set_up(row)].append(i)
    return {
        i: [rows[j] for j in places if rows[j].num_gpus > rows[i].num_gpus]
        for places in groups.values()
        for i in places
    }


def _set_up(row: PublishedRow) -> tuple[object, ...]:
    """Returns what must be equal for the work per GPU to be equal."""
    assert row.global_batch is not None
    # Degrees of data parallelism say the number of GPUs again.
    words = row.strategy.split()
    spread = " ".join(word for word in words if not re.fullmatch("DP[0-9]+", word))
    model = (row.source, row.model, row.num_layers, row.width, row.sequence_length)
    work = (row.micro_batch, row.global_batch / row.num_gpus, row.activation_checkpointing)
    return (*model, *work, row.gpu, spread, row.precision, row.is_compiled)


def _slower_than(row: PublishedRow, larger: Sequence[PublishedRow]) -> Iterable[str]:
    best = max(larger, key=lambda other: other.tokens_per_s or 0.0, default=None)
    if best is None or not row.tokens_per_s or not best.tokens_per_s:
        return
    below = 1 - row.tokens_per_s / best.tokens_per_s
    if below > SCALING_TOLERANCE:
        yield (
            f"{row.tokens_per_s:,.0f} tokens/s on {row.num_gpus} GPUs are {below:.0%} below the "
            f"{best.tokens_per_s:,.0f} of {best.num_gpus} GPUs with the same work per GPU"
        )
