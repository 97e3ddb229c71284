"""Draws histories: a panel each, records as dots, medians as lines, changes as marked places."""

import statistics
from collections.abc import Sequence
from itertools import pairwise

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling.comparison.trend import History
from unitransformer.plots import DASHED, DOTTED, INK, SMALL, TITLE, TRAIN, VALIDATION, WIDTH

MAX_TICKS = 7
MAX_LABEL = 34  # letters


def draw_histories(histories: Sequence[History]) -> Figure:
    """Draws the step times of each history by the order of its records."""
    figure, grid = plt.subplots(
        *(len(histories), 1),
        figsize=(1.3 * WIDTH, 0.5 + 2.6 * len(histories)),
        squeeze=False,
        layout="constrained",
    )
    for axes, history in zip(grid.flat, histories, strict=True):
        _draw(axes, history)
    return figure


def _draw(axes: Axes, history: History) -> None:
    points = history.points
    milliseconds = [1000 * point.seconds for point in points]
    axes.plot(range(len(points)), milliseconds, "o", color=TRAIN, markersize=4, alpha=0.7)
    for low, high in pairwise(history.bounds):
        median = statistics.median(milliseconds[low:high])
        axes.plot([low - 0.4, high - 0.6], [median] * 2, color=INK, linewidth=1.6)
    for number, change in enumerate(history.changes):
        axes.axvline(
            change.index - 0.5,
            color=VALIDATION if change.is_found else INK,
            linestyle=DASHED if change.is_found else DOTTED,
            linewidth=1.2,
        )
        percent = f"{change.ratio - 1:+.1%}"
        name = f"since {points[change.index].commit}" if change.is_found else change.what
        axes.annotate(
            f"{percent} {name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + '…'}",
            (change.index - 0.5, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2 - 11 * (number % 3)),  # neighbors do not overlap
            textcoords="offset points",
            va="top",
            fontsize=SMALL,
            color=VALIDATION if change.is_found else INK,
        )
    axes.set_title(f"{history.title} ({history.cell})", loc="left", fontsize=TITLE, color=INK)
    axes.set_ylabel(f"{history.clock} of a step (ms)", color=INK, fontsize=SMALL)
    step = max(1, -(-len(points) // MAX_TICKS))
    ticks = range(0, len(points), step)
    names = [f"{points[i].commit}\n{points[i].started_at:%Y-%m-%d}" for i in ticks]
    axes.set_xticks(ticks, names)
    axes.margins(y=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=SMALL)
    axes.grid(alpha=0.25, axis="y")
