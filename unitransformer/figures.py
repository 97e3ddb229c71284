"""Pictures for people: sample pictures with titles, a picture cut into patches."""

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from unitransformer.config import ModelConfig
from unitransformer.plots import INK, write_figure
from unitransformer.transformer import PatchEncoding

__all__ = ["patch_figure", "picture_grid", "write_figure"]


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
    assert model.image_size is not None
    assert model.patch_size is not None
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


def _pixels(picture: Tensor, low: float | None = None, high: float | None = None) -> Any:
    low = float(picture.min()) if low is None else low
    high = float(picture.max()) if high is None else high
    scaled = (picture.float().cpu() - low) / max(high - low, 1e-6)
    rows = scaled.permute(1, 2, 0).clamp(0, 1)
    return (rows if rows.shape[-1] == 3 else rows[..., :1].expand(-1, -1, 3)).numpy()
