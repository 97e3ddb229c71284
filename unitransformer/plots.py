"""Plots for people: curves in, a file out that is the same whenever the curves are. No torch."""

import io
from collections.abc import Sequence
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
