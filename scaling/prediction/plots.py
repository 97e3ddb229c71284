"""Draws predictions against the number of devices: speed, efficiency, memory and cost.

A line is a combination of the values that differ; if there are more than six, a strategy and model.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from scaling.prediction.best import fastest_by_devices
from scaling.prediction.predict import Interval, Prediction
from unitransformer.record.units import UNIT

if TYPE_CHECKING:  # importing it loads matplotlib, which only a plot needs
    from unitransformer.plots import BandPanel, PlotLine

MOST_LINES = 6
COLORS = ("#1490d8", "#c0622b", "#3f9160", "#a050a8", "#998c4c", "#6e7781")
BILLION = 1e9
GIB = 2**30

Curves = Mapping[str, Sequence[Prediction]]  # by label, at most one prediction for a device count


def curves_of(
    predictions: Sequence[Prediction], labels: Sequence[str], short: Sequence[str]
) -> Curves:
    """Returns lines by ascending devices, the best first; a point that does not fit is left out.

    Args:
        labels: what distinguishes each prediction beside the number of devices.
        short: the same by strategy and model alone, for when there are too many lines: each then
            has the fastest prediction at every number of devices.
    """
    is_short = len(set(labels)) > MOST_LINES
    names = short if is_short else labels
    curves = {}
    for name in dict.fromkeys(names):
        group = [p for p, label in zip(predictions, names, strict=True) if label == name]
        best = [p for p in fastest_by_devices(group).values() if p is not None]
        if best:
            label = f"{name}, fastest" if is_short and name else name or "fastest"
            curves[label] = sorted(best, key=lambda p: p.config.parallel.world_size)
    return dict(sorted(curves.items(), key=lambda item: _rank(item[1]), reverse=True))


def _rank(curve: Sequence[Prediction]) -> tuple[int, float]:
    """Orders lines by how far they reach, and then by their speed there."""
    return curve[-1].config.parallel.world_size, curve[-1].units_per_s.value


def draw(
    curves: Curves,
    *,
    tokens: float | None,
    price_per_hour: float | None,
    common: Sequence[str],
    kind: Literal["png", "svg"],
) -> bytes:
    """Renders the four panels.

    Args:
        common: what all lines share.
        tokens: whose cost is drawn; None: a billion.
        price_per_hour: USD for a device; None: the cost is in device-hours.

    Raises:
        ValueError: nothing fits, so that there is nothing to draw.
    """
    from unitransformer.plots import band_panels, figure_bytes

    if not curves:
        raise ValueError("nothing fits on a device, so there is nothing to draw; see the table")
    num_lines = len(curves)
    curves = dict(list(curves.items())[:MOST_LINES])
    first = next(iter(curves.values()))[0]
    config, hardware = first.config, first.hardware
    drawn = [p for curve in curves.values() for p in curve]
    kinds = {p.time.provenance for p in drawn}
    size = f" {config.size}" if len({p.config.size for p in drawn}) == 1 else ""
    sentences = {
        "Bands: 90\u00a0% intervals.": True,
        "Dotted: extrapolated, so that only the band counts.": "extrapolated" in kinds,
        "Dots: measured.": "measured" in kinds,
        "What does not fit is not drawn.": True,
        f"Only the fastest {MOST_LINES} of {num_lines} lines.": num_lines > MOST_LINES,
    }
    figure = band_panels(
        panels_of(curves, tokens, price_per_hour),
        title=f"{config.recipe}{size} on {hardware.name}, predicted",
        caption=" ".join(
            [
                *(sentence for sentence, applies in sentences.items() if applies),
                f"All: {', '.join(common)}.",
            ]
        ),
        x="devices",
    )
    return figure_bytes(figure, kind)


def panels_of(curves: Curves, tokens: float | None, price: float | None) -> "list[BandPanel]":
    """Returns speed, efficiency, memory and cost; the last for `tokens`, or a billion."""
    from unitransformer.plots import DASHED, BandPanel, PlotLine, PlotPoint

    first = next(iter(curves.values()))[0]
    unit, amount = UNIT[first.config.recipe], tokens or BILLION

    def lines(
        of: Callable[[Prediction], Interval], *, is_time: bool = True
    ) -> "tuple[PlotLine, ...]":
        drawn = []
        for color, (name, curve) in zip(COLORS, curves.items(), strict=False):
            marks = []
            for p in curve:
                interval, provenance = of(p), p.time.provenance
                is_measured = is_time and provenance == "measured"
                point = PlotPoint(
                    x=p.config.parallel.world_size,
                    value=interval.value,
                    low=interval.low if is_time else None,
                    high=interval.high if is_time else None,
                    samples=(interval.value,) if is_measured else (),
                    is_known=not is_time or provenance != "extrapolated",
                )
                marks.append(point)
            drawn.append(PlotLine(label=name, marks=tuple(marks), color=color))
        return tuple(drawn)

    counts = [p.config.parallel.world_size for curve in curves.values() for p in curve]
    capacity = first.memory.capacity / GIB
    ends = tuple(PlotPoint(x=x, value=capacity) for x in (min(counts), max(counts)))
    limit = PlotLine(label="of the device", marks=ends, style=DASHED, thickness=1.0)
    memory = lines(lambda p: _exact(p.memory.total_bytes / GIB), is_time=False)
    currency = "device-hours" if price is None else "USD"
    cost = f"cost of {amount / BILLION:,.4g} billion {unit} ({currency})"
    return [
        BandPanel(
            title=f"{unit} per second", lines=lines(lambda p: p.units_per_s), is_logarithmic=True
        ),
        BandPanel(
            title="efficiency: share of the peak (MFU)", lines=lines(lambda p: p.mfu), percent=True
        ),
        BandPanel(title="peak memory per device (GiB)", lines=(*memory, limit)),
        BandPanel(title=cost, lines=lines(lambda p: p.cost(amount, price or 1.0))),
    ]


def _exact(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }}
svg {{ width: 100%; height: auto }}
pre {{ overflow-x: auto; font-size: 13px }}
</style>
</head>
<body>
<h1>{title}</h1>
{figure}
{blocks}
</body>
</html>
"""


def render_page(title: str, svg: bytes, blocks: Sequence[str]) -> bytes:
    """Returns a page that loads nothing: the figure, then the printed blocks as they are."""
    figure = svg.decode()
    shown = "\n".join(f"<pre>{html.escape(block)}</pre>" for block in blocks)
    return PAGE.format(
        title=html.escape(title), figure=figure[figure.index("<svg") :], blocks=shown
    ).encode()
