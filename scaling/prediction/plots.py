"""Draws predictions against the number of devices: speed, efficiency, memory and cost.

A line is a combination of the values that differ; if there are more than six, a strategy and model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from scaling.prediction.best import fastest_by_devices, usable_bytes
from scaling.prediction.predict import Interval, Prediction
from unitransformer.record.units import UNIT

if TYPE_CHECKING:  # importing it loads matplotlib, which only a plot needs
    from unitransformer.plots import BandPanel, PlotLine

MOST_LINES = 6
MOST_BANDS = 2  # more of them overlap into one
# A strategy has the same color in every plot.
COLORS = {
    "ddp": "#6e7781",
    "single": "#6e7781",
    "fsdp": "#1490d8",
    "fsdp1": "#a07850",
    "hsdp": "#3f9160",
    "zero1": "#998c4c",
    "zero2": "#c0622b",
    "zero3": "#a050a8",
}
# Of several lines of one strategy: full, dashed, dash and dot, ...; dotted is an extrapolation.
STYLES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "-",
    (0, (6, 2)),
    (0, (6, 2, 1, 2)),
    (0, (3, 2)),
    (0, (9, 2)),
    (0, (9, 2, 1, 2)),
)
BILLION = 1e9
GIB = 2**30

Curves = Mapping[str, Sequence[Prediction]]  # by label, at most one prediction for a device count


def curves_of(predictions: Sequence[Prediction], keys: Sequence[str]) -> list[list[Prediction]]:
    """Returns lines by ascending devices, the best first; a point that does not fit is left out.

    Args:
        keys: the line of each prediction; it has the fastest at every number of devices.
    """
    curves = []
    for name in dict.fromkeys(keys):
        group = [p for p, key in zip(predictions, keys, strict=True) if key == name]
        best = [p for p in fastest_by_devices(group).values() if p is not None]
        if best:
            curves.append(sorted(best, key=lambda p: p.config.parallel.world_size))
    return sorted(curves, key=_rank, reverse=True)


def _rank(curve: Sequence[Prediction]) -> tuple[int, float]:
    """Orders lines by how far they reach, and then by their speed there."""
    return curve[-1].config.parallel.world_size, curve[-1].units_per_s.value


def draw(
    curves: Curves,
    *,
    tokens: float | None,
    price_per_hour: float | None,
    common: Sequence[str],
    chosen: Sequence[str],
    num_lines: int,
    kind: Literal["png", "svg"],
) -> bytes:
    """Renders the four panels.

    Args:
        common: what all lines share.
        chosen: the values that a line has chosen of, such as "fsdp: batch 4 to 8".
        num_lines: how many there are, of which `curves` are the fastest.
        tokens: whose cost is drawn; None: a billion.
        price_per_hour: USD for a device; None: the cost is in device-hours.

    Raises:
        ValueError: nothing fits, so that there is nothing to draw.
    """
    from unitransformer.plots import band_panels, figure_bytes

    if not curves:
        raise ValueError(
            "nothing fits on a device, so there is no plot; choose a batch or strategy that fits"
        )
    first = next(iter(curves.values()))[0]
    config, hardware = first.config, first.hardware
    drawn = [p for curve in curves.values() for p in curve]
    ends = f"{min(p.config.parallel.world_size for p in drawn):,} to "
    ends += f"{max(p.config.parallel.world_size for p in drawn):,} devices"
    kinds = {p.time.provenance for p in drawn}
    best, has_guesses = next(iter(curves)), "extrapolated" in kinds
    size = f" {config.size}" if len({p.config.size for p in drawn}) == 1 else ""
    sentences = {
        "Bands: 90\u00a0% intervals.": len(curves) <= MOST_BANDS,
        f"Band: 90\u00a0% interval of {best} alone.": len(curves) > MOST_BANDS and not has_guesses,
        f"Bands: 90\u00a0% intervals of {best} and of all that is extrapolated.": (
            len(curves) > MOST_BANDS and has_guesses
        ),
        "Dotted: extrapolated, so that only the interval counts.": has_guesses,
        "Dots: measured.": "measured" in kinds,
        "What does not fit is not drawn.": True,
        f"Only the fastest {MOST_LINES} of {num_lines} lines.": num_lines > len(curves),
        f"A line has the fastest of its kind; from {ends}, {'; '.join(chosen)}.": bool(chosen),
        f"All: {', '.join(common)}.": True,
    }
    figure = band_panels(
        panels_of(curves, tokens, price_per_hour),
        title=f"{config.recipe}{size} on {hardware.name}, predicted",
        caption=" ".join(sentence for sentence, applies in sentences.items() if applies),
        x="devices",
    )
    return figure_bytes(figure, kind)


def panels_of(curves: Curves, tokens: float | None, price: float | None) -> "list[BandPanel]":
    """Returns speed, efficiency, memory and cost; the last for `tokens`, or a billion."""
    from unitransformer.plots import DASHED, INK, BandPanel, PlotLine, PlotPoint

    first = next(iter(curves.values()))[0]
    unit, amount = UNIT[first.config.recipe], tokens or BILLION

    def lines(
        of: Callable[[Prediction], Interval], curves: Curves = curves, *, is_time: bool = True
    ) -> "tuple[PlotLine, ...]":
        drawn: list[PlotLine] = []
        for name, curve in curves.items():
            marks = []
            has_band = is_time and (not drawn or len(curves) <= MOST_BANDS)
            # An extrapolation has its interval wherever it is drawn, from the point before it.
            guessed = [i for i, p in enumerate(curve) if p.time.provenance == "extrapolated"]
            first, last = (guessed[0] - 1, guessed[-1] + 1) if guessed and is_time else (0, -1)
            for i, p in enumerate(curve):
                has_interval = has_band or first <= i <= last
                interval, provenance = of(p), p.time.provenance
                is_measured = is_time and provenance == "measured"
                point = PlotPoint(
                    x=p.config.parallel.world_size,
                    value=interval.value,
                    low=interval.low if has_interval else None,
                    high=interval.high if has_interval else None,
                    samples=(interval.value,) if is_measured else (),
                    is_known=not is_time or provenance != "extrapolated",
                )
                marks.append(point)
            strategies = {p.config.parallel.strategy for p in curve}
            color = COLORS[strategies.pop()] if len(strategies) == 1 else INK
            style = STYLES[sum(line.color == color for line in drawn) % len(STYLES)]
            drawn.append(PlotLine(label=name, marks=tuple(marks), color=color, style=style))
        return tuple(drawn)

    every = [p for curve in curves.values() for p in curve]
    every.sort(key=lambda p: p.config.parallel.world_size)
    ends = tuple(
        PlotPoint(x=p.config.parallel.world_size, value=usable_bytes(p.hardware) / GIB)
        for p in (every[0], every[-1])
    )
    limit = PlotLine(label="fits below", marks=ends, style=DASHED, thickness=1.0)
    memory = lines(lambda p: _exact(p.memory.total_bytes / GIB), is_time=False)
    currency = "device-hours" if price is None else "USD"
    cost = f"cost of {amount / BILLION:,.4g} billion {unit} ({currency})"
    speed = lines(lambda p: p.units_per_s, {"fastest": _fastest(curves)})
    return [
        BandPanel(
            title=f"{unit} per second of the fastest",
            lines=speed,
            is_logarithmic=_spans_two_ticks(speed),
        ),
        BandPanel(
            title="efficiency: share of the peak (MFU)", lines=lines(lambda p: p.mfu), percent=True
        ),
        BandPanel(title="peak memory per device (GiB)", lines=(*memory, limit)),
        BandPanel(title=cost, lines=lines(lambda p: p.cost(amount, price or 1.0))),
    ]


def _spans_two_ticks(lines: "Sequence[PlotLine]") -> bool:
    """Whether two powers of ten, the ticks of a logarithmic axis, are between the ends of bands."""
    ends = [end for line in lines for m in line.marks for end in (m.low, m.high) if end is not None]
    return math.floor(math.log10(max(ends))) > math.ceil(math.log10(min(ends)))


def _fastest(curves: Curves) -> list[Prediction]:
    """Returns the fastest point of all lines at every number of devices."""
    best = fastest_by_devices([p for curve in curves.values() for p in curve])
    return [p for _, p in sorted(best.items()) if p is not None]


def _exact(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)
