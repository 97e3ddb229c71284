"""Draws loss curves and panels of lines, without torch; equal input gives equal files.

Figures are transparent, and every color has a contrast of at least 3 to 1 on white and on GitHub's
dark page. Each line has its label at its right end.
"""

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import matplotlib

matplotlib.use("Agg", force=False)  # needs no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

TRAIN, VALIDATION, INK = "#1490d8", "#c0622b", "#7b7b7b"
WIDTH = 7.0  # inches; about 670 pixels on GitHub
TITLE, FONT, SMALL = 11.0, 9.5, 8.5  # points
CAPTION_WIDTH = 115  # letters
MAX_LEGEND_COLUMNS = 4
MAX_MARKED_STEPS = 40  # with more steps, the training loss is a line without markers
DASHED = (0, (5, 3))
DOTTED = (0, (1, 2))
LEADER_END = 1.025
LABEL_X = 1.03  # left end of the line labels, in panel widths
MIN_TICK_GAP = 0.09  # between labeled ticks, in panel widths


@dataclass(frozen=True, kw_only=True)
class PlotPoint:
    """A point of a line, optionally with the interval from `low` to `high`."""

    x: float
    value: float
    samples: tuple[float, ...] = ()  # single measurements, drawn as small dots
    low: float | None = None
    high: float | None = None
    is_known: bool = True  # a line to a point that is not is dotted


@dataclass(frozen=True, kw_only=True)
class PlotLine:
    """One line of a panel."""

    label: str  # at its right end
    marks: tuple[PlotPoint, ...]
    color: str = INK
    marker: str = ""
    style: str | tuple[int, tuple[int, ...]] = "-"
    thickness: float = 1.4


@dataclass(frozen=True, kw_only=True)
class BandPanel:
    """A quantity with its unit, and lines whose intervals are bands."""

    title: str
    lines: tuple[PlotLine, ...]
    is_logarithmic: bool = False
    percent: bool = False


def loss_figure(
    losses: Sequence[float],
    validation: Sequence[dict[str, float]],
    *,
    title: str,
    baseline: tuple[str, float] | None = None,
) -> Figure:
    """Draws the training loss of every step, the validation loss and the baseline to beat."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    lines = [
        PlotLine(
            label="training",
            marks=tuple(PlotPoint(x=step, value=loss) for step, loss in enumerate(losses, 1)),
            color=TRAIN,
            marker="." if len(losses) <= MAX_MARKED_STEPS else "",
            thickness=1.1,
        )
    ]
    if validation:
        points = [PlotPoint(x=point["step"], value=point["val_loss"]) for point in validation]
        lines.append(
            PlotLine(label="validation", marks=tuple(points), color=VALIDATION, marker="o")
        )
    if baseline is not None:
        name, value = baseline
        ends = tuple(PlotPoint(x=step, value=value) for step in (1, max(len(losses), 1)))
        lines.append(PlotLine(label=f"to beat: {name}", marks=ends, style=DASHED, thickness=1.0))
    for line in lines:
        _draw_line(axes, line)
    axes.set(xlabel="optimizer step", ylabel="cross entropy (nats)")
    axes.set_title(_literal(f"{title}: loss while training"), loc="left", fontsize=TITLE, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 2.5
    axes.margins(x=0.02)
    _style(axes)
    _label_ends(figure, {axes: lines})
    return figure


def line_panels(
    panels: Mapping[str, Sequence[PlotLine]],
    *,
    title: str,
    caption: str,
    x: str,
    y: str,
    markers: Mapping[str, str],
) -> Figure:
    """Draws panels of lines, two per row, all with the same axes.

    Args:
        panels: lines by panel title.
        caption: text below the panels.
        markers: marker by its meaning, for the legend.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(WIDTH, 1.3 + 2.1 * rows), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    drawn = dict(zip(grid.flat, panels.values(), strict=False))
    xs = sorted({mark.x for lines in panels.values() for line in lines for mark in line.marks})
    for axes, (panel, lines) in zip(drawn, panels.items(), strict=True):
        for line in lines:
            _draw_line(axes, line)
        axes.set_title(_literal(panel), fontsize=FONT, color=INK)
        axes.set_xscale("log", base=2)
        axes.set_xlim(xs[0] / 1.1, xs[-1] * 1.1)
        axes.set_xticks(xs, _tick_labels(xs))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        _style(axes)
    grid[0][0].set_ylim(bottom=0)  # last, because it ends automatic scaling
    for axes in [*drawn][-columns:]:
        axes.set_xlabel(_literal(x), color=INK)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.supylabel(_literal(y), color=INK, fontsize=FONT)
    text = textwrap.fill(_literal(caption), CAPTION_WIDTH)
    figure.supxlabel(text, x=0.01, ha="left", ma="left", color=INK, fontsize=SMALL)
    figure.legend(
        [Line2D([], [], color=INK, marker=marker, linestyle="") for marker in markers.values()],
        [_literal(name) for name in markers],
        title=_literal(title),
        loc="outside upper left",
        ncols=min(len(markers), MAX_LEGEND_COLUMNS),
        alignment="left",
        frameon=False,
        labelcolor=INK,
        fontsize=SMALL,
        title_fontproperties={"size": TITLE},
        handletextpad=0.2,
    ).get_title().set_color(INK)
    _label_ends(figure, drawn)
    return figure


def band_panels(panels: Sequence[BandPanel], *, title: str, caption: str, x: str) -> Figure:
    """Draws panels of different quantities, two per row, with intervals as bands.

    A point with `samples` gets a dot and a bar, a point that is not known a dotted line.
    """
    rows = math.ceil(len(panels) / 2)
    figure, grid = plt.subplots(
        rows, 2, figsize=(1.4 * WIDTH, 0.9 + 2.6 * rows), squeeze=False, layout="constrained"
    )
    drawn = dict(zip(grid.flat, panels, strict=False))
    xs = sorted({mark.x for p in panels for line in p.lines for mark in line.marks})
    for axes, panel in drawn.items():
        for line in panel.lines:
            _draw_band(axes, line)
        axes.set_title(_literal(panel.title), loc="left", fontsize=FONT, color=INK)
        axes.set_xscale("log", base=2)
        axes.set_xlim(xs[0] / 1.1, xs[-1] * 1.1)
        axes.set_xticks(xs, _tick_labels(xs))
        if panel.is_logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _, p=panel.percent: f"{value:.0%}" if p else _short(value))
        )
        _style(axes)
        if not panel.is_logarithmic:
            axes.set_ylim(bottom=0)
    for axes in [*drawn][-2:]:
        axes.set_xlabel(_literal(x), color=INK, fontsize=SMALL)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.suptitle(_literal(title), x=0.01, ha="left", color=INK, fontsize=TITLE)
    text = textwrap.fill(_literal(caption), int(1.4 * CAPTION_WIDTH))
    figure.supxlabel(text, x=0.01, ha="left", ma="left", color=INK, fontsize=SMALL)
    _label_ends(figure, {axes: panel.lines for axes, panel in drawn.items() if panel.lines})
    return figure


def _draw_band(axes: Axes, line: PlotLine) -> None:
    band = [(m.x, m.low, m.high) for m in line.marks if m.low is not None and m.high is not None]
    measured = {mark.x for mark in line.marks if mark.samples}
    xs, lows, highs = ([point[i] for point in band] for i in range(3))
    axes.fill_between(xs, lows, highs, color=line.color, alpha=0.18, linewidth=0)
    for begin, end in itertools.pairwise(line.marks):
        style = line.style if begin.is_known and end.is_known else DOTTED
        axes.plot(
            [begin.x, end.x],
            [begin.value, end.value],
            color=line.color,
            linestyle=style,
            linewidth=line.thickness,
        )
    if len(line.marks) == 1 and not line.marks[0].samples:
        axes.plot(line.marks[0].x, line.marks[0].value, "_", color=line.color, markersize=10)
    for mark in line.marks:
        for value in mark.samples:
            axes.plot(mark.x, value, "o", color=line.color, markersize=5)
    for x, low, high in (point for point in band if point[0] in measured):
        axes.plot([x] * 2, [low, high], color=line.color, lw=2.5, alpha=0.6)


def _short(value: float) -> str:
    """Formats a tick: 0.5, 200, 30k, 4M."""
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * scale or (suffix != "k" and abs(value) >= scale):
            return f"{value / scale:,.10g}{suffix}"
    return f"{value:,.10g}"


def figure_bytes(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """Renders and closes `figure`, without dates, versions or random names in the file."""
    content = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "unitransformer"}):
        figure.savefig(content, format=kind, dpi=110, transparent=True, metadata=metadata)
    plt.close(figure)
    return content.getvalue()


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Moves ascending heights as little as possible so that neighbors are `gap` apart.

    Least squares: neighbors that are too close move apart around their mean. The results lie
    between 0 and 1 if there is room.
    """
    blocks: list[list[float]] = []
    for index, height in enumerate(heights):
        blocks.append([height - index * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    means = [fmean(block) for block in blocks for _ in block]
    room = 1 - gap * (len(heights) - 1)
    return [max(min(mean, room), 0) + index * gap for index, mean in enumerate(means)]


def _draw_line(axes: Axes, line: PlotLine) -> None:
    axes.plot(
        [mark.x for mark in line.marks],
        [mark.value for mark in line.marks],
        color=line.color,
        marker=line.marker,
        markersize=5,
        linewidth=line.thickness,
        linestyle=line.style,
    )
    dots = [(mark.x, value) for mark in line.marks for value in mark.samples]
    if dots:
        axes.plot(*zip(*dots, strict=True), ".", color=line.color, markersize=3.5, alpha=0.6)
    for mark in line.marks:
        if mark.low is not None and mark.high is not None:
            axes.plot([mark.x] * 2, [mark.low, mark.high], color=line.color, lw=2.5, alpha=0.4)


def _label_ends(figure: Figure, panels: Mapping[Axes, Sequence[PlotLine]]) -> None:
    """Writes the label of each line to the right of its panel, connected to the end of the line.

    Labels that would overlap are moved apart.
    """
    labels = {
        axes: [
            (
                line,
                axes.text(
                    LABEL_X,
                    0.5,
                    _literal(line.label),
                    transform=axes.transAxes,
                    verticalalignment="center",
                    color=line.color,
                    fontsize=SMALL,
                ),
            )
            for line in sorted(lines, key=lambda line: line.marks[-1].value)
        ]
        for axes, lines in panels.items()
    }
    figure.draw_without_rendering()  # computes the heights of the panels
    figure.set_layout_engine("none")  # computing it again would take a third of the time
    for axes, written in labels.items():
        to_panel = axes.transData + axes.transAxes.inverted()
        last = [line.marks[-1] for line, _ in written]
        ends = [to_panel.transform((mark.x, mark.value)) for mark in last]
        gap = SMALL * 1.2 / 72 * figure.dpi / axes.get_window_extent().height
        heights = spread_labels([float(end[1]) for end in ends], gap)
        for (line, label), end, height in zip(written, ends, heights, strict=True):
            label.set_y(height)
            # A plain line: matplotlib takes a second to clip the arrows of a large plot.
            leader = Line2D(
                [end[0], LEADER_END],
                [end[1], height],
                transform=axes.transAxes,
                color=line.color,
                linewidth=0.6,
                clip_on=False,
            )
            leader.set_in_layout(False)
            axes.add_artist(leader)


def _tick_labels(xs: Sequence[float]) -> list[str]:
    """Returns labels of a logarithmic axis; empty for ticks too close to the label before."""
    labels, last = [], -math.inf
    width = math.log(xs[-1] / xs[0]) or 1.0
    for x in xs:
        is_far = math.log(x) - last >= MIN_TICK_GAP * width
        last = math.log(x) if is_far else last
        labels.append(f"{x:g}" if is_far else "")
    return labels


def _literal(text: str) -> str:
    """Escapes dollar signs, which would start a formula."""
    return text.replace("$", r"\$")


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=SMALL)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
    axes.grid(alpha=0.25)
