"""Plots for people: curves in, a file out that is the same whenever the curves are. No torch."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg", force=False)  # a figure must not need a screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Readable on light and dark pages: mid tones on a transparent ground.
TRAIN, VALIDATION, BASELINE, INK = "#3b82c4", "#e07b39", "#8a8a8a", "#7a7a7a"
LINES = ("#3b82c4", "#e07b39", "#3f9d6b", "#b0559f", "#c0504d", "#8a7a3a", "#5f7fbf", "#7a7a7a")
FEW_STEPS = 40  # up to here each step gets a mark


def loss_figure(
    losses: Sequence[float],
    validation: Sequence[dict[str, float]],
    *,
    title: str,
    baseline: tuple[str, float] | None = None,
) -> Figure:
    """Training loss of every step, validation loss, and a line to beat."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(
        range(1, len(losses) + 1),
        losses,
        color=TRAIN,
        linewidth=1.2,
        marker="." if len(losses) <= FEW_STEPS else "",
        label="training",
    )
    if validation:
        axes.plot(
            [point["step"] for point in validation],
            [point["val_loss"] for point in validation],
            color=VALIDATION,
            marker="o",
            markersize=4,
            label="validation",
        )
    if baseline is not None:
        name, value = baseline
        axes.axhline(value, color=BASELINE, linestyle="--", linewidth=1, label=_as_it_is(name))
    axes.set(xlabel="optimizer step", ylabel="cross entropy (nats)", title=_as_it_is(title))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 2.5
    _plain(axes)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


Point = tuple[float, float, float | None, float | None]  # x, y, and the ends of its interval


def line_panels(
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    *,
    title: str,
    x: str,
    y: str,
    ideals: Sequence[Sequence[tuple[float, float]]] = (),
) -> Figure:
    """Lines with intervals, a panel beside another; one legend for all.

    Args:
        ideals: lines along which nothing is lost, dotted.
    """
    figure, grid = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels) + 2.2, 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    names = sorted({name for lines in panels.values() for name in lines})
    colours = {name: LINES[index % len(LINES)] for index, name in enumerate(names)}
    for axes, (panel, lines) in zip(grid[0], sorted(panels.items()), strict=True):
        for name, points in sorted(lines.items()):
            axes.plot(
                [point[0] for point in points],
                [point[1] for point in points],
                color=colours[name],
                marker="o",
                markersize=4,
                linewidth=1.2,
                linestyle="-" if names.index(name) < len(LINES) else "--",
                label=_as_it_is(name),
            )
            for at, _, low, high in points:
                if low is not None and high is not None:
                    axes.plot([at, at], [low, high], color=colours[name], linewidth=2.5, alpha=0.4)
        for ideal in ideals:
            axes.plot(
                *zip(*ideal, strict=True),
                color=BASELINE,
                linestyle=":",
                linewidth=2.5,
                label="nothing lost",
            )
        axes.set(xlabel=_as_it_is(x), title=_as_it_is(panel))
        axes.set_ylim(bottom=0)
        ticks = sorted(
            {point[0] for lines_ in panels.values() for p in lines_.values() for point in p}
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        _plain(axes)
    grid[0][0].set_ylabel(_as_it_is(y))
    handles = {
        label: handle
        for axes in grid[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [handles[name] for name in sorted(handles)],
        sorted(handles),
        loc="outside right upper",
        frameon=False,
        labelcolor=INK,
        fontsize="small",
    )
    figure.suptitle(_as_it_is(title), color=INK)
    return figure


def figure_bytes(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The file of `figure`, closed after: no date, version or random name inside, so that equal
    figures are equal files."""
    content = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "unitransformer"}):
        figure.savefig(content, format=kind, dpi=110, transparent=True, metadata=metadata)
    plt.close(figure)
    return content.getvalue()


def write_figure(figure: Figure, path: Path) -> Path:
    """Save as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figure_bytes(figure, "png"))
    return path


def _as_it_is(text: str) -> str:
    """A pair of dollars would start a formula."""
    return text.replace("$", r"\$")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
    axes.grid(alpha=0.25)
