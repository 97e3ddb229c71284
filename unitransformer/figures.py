"""Pictures for people: loss curves, sample pictures, a picture cut into patches, predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)  # a figure must not need a screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from unitransformer.config import ModelConfig
from unitransformer.transformer import PatchEncoding

# Readable on light and dark pages: mid tones on a transparent ground.
TRAIN, VALIDATION, BASELINE, INK = "#3b82c4", "#e07b39", "#8a8a8a", "#7a7a7a"


def loss_figure(
    losses: Sequence[float],
    validation: Sequence[dict[str, float]],
    *,
    title: str,
    baseline: tuple[str, float] | None = None,
) -> Figure:
    """Training loss of every step, validation loss, and a line to beat."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color=TRAIN, linewidth=1.2, label="training")
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
        axes.axhline(value, color=BASELINE, linestyle="--", linewidth=1, label=name)
    axes.set(xlabel="optimizer step", ylabel="cross entropy (nats)", title=title)
    _plain(axes)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def picture_grid(
    pictures: Tensor, titles: Sequence[str], *, columns: int = 6, colors: Sequence[str] = ()
) -> Figure:
    """(B, C, S, S) pictures in rows, each with a title."""
    rows = -(-len(pictures) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.6 * columns, 1.9 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for index, (axes, picture) in enumerate(zip(grid.flat, pictures, strict=False)):
        axes.imshow(_pixels(picture))
        axes.set_title(titles[index], fontsize=9, color=colors[index] if colors else INK)
    return figure


def patch_figure(picture: Tensor, model: ModelConfig) -> Figure:
    """A (C, S, S) picture as the network's patches, in their order and places."""
    assert model.image_size is not None and model.patch_size is not None
    patches = PatchEncoding(model.patch_size)(picture.unsqueeze(0))[0]
    side = model.image_size // model.patch_size
    low, high = float(picture.min()), float(picture.max())
    figure, grid = plt.subplots(
        side, side, figsize=(5, 5), squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08}
    )
    for axes, patch in zip(grid.flat, patches, strict=True):
        shape = (model.num_channels, model.patch_size, model.patch_size)
        axes.imshow(_pixels(patch.view(shape), low, high))
        axes.axis("off")
    return figure


def write_figure(figure: Figure, path: Path) -> Path:
    """Save without a date or version inside, so that equal figures are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, transparent=True, metadata={"Software": None})
    plt.close(figure)
    return path


def _pixels(picture: Tensor, low: float | None = None, high: float | None = None) -> Any:
    low = float(picture.min()) if low is None else low
    high = float(picture.max()) if high is None else high
    scaled = (picture.float().cpu() - low) / max(high - low, 1e-6)
    rows = scaled.permute(1, 2, 0).clamp(0, 1)
    return (rows if rows.shape[-1] == 3 else rows[..., :1].expand(-1, -1, 3)).numpy()


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
    axes.grid(alpha=0.25)
