"""Figures of images, without matplotlib."""

import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import showcase
from recipes.showcase import GAP_PX, HEAD_PX, IMAGE_PX, image_grid, patch_figure, save_image
from tests.processes import PATIENCE_S
from unitransformer import plots
from unitransformer.config import ModelConfig


def make_model(image_size: int, patch_size: int, channels: int) -> ModelConfig:
    return ModelConfig(
        width=4,
        num_layers=1,
        num_heads=1,
        feedforward_width=4,
        num_classes=2,
        num_positions=(image_size // patch_size) ** 2 + 1,
        image_size=image_size,
        patch_size=patch_size,
        num_channels=channels,
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_stand_where_they_are_in_the_image_with_transparent_gaps(channels: int) -> None:
    """An image of 700 pixels is not enlarged: two by two patches of 350, gaps of 30."""
    image = torch.zeros(channels, 700, 700)
    image[:, :350, 350:] = 1.0
    image[:, 350:, :350] = 0.2
    pixels = np.asarray(patch_figure(image, make_model(700, 350, channels)))
    assert pixels.shape == (730, 730, 4)
    assert (pixels[:350, :350] == (0, 0, 0, 255)).all()
    assert (pixels[:350, 380:] == (255, 255, 255, 255)).all()
    assert (pixels[380:, :350] == (51, 51, 51, 255)).all()
    assert (pixels[350:380] == 0).all()
    assert (pixels[:, 350:380] == 0).all()


def test_patches_keep_the_order_of_pixels_and_colors_when_they_are_enlarged() -> None:
    """280 pixels become 560, and each patch of 140 becomes one of 280, with gaps of 24."""
    image = torch.rand(3, 280, 280)
    image[0, 0, 0], image[0, 0, 1] = 0.0, 1.0  # the range of all values
    pixels = np.asarray(patch_figure(image, make_model(280, 140, 3)))
    together = np.delete(pixels, range(280, 304), axis=0)
    together = np.delete(together, range(280, 304), axis=1)
    expected = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    assert (together[::2, ::2, :3] == expected).all()
    assert (together[1::2, 1::2, :3] == expected).all()


def test_images_stand_in_rows_of_six_below_their_titles() -> None:
    images = torch.zeros(8, 1, IMAGE_PX, IMAGE_PX)
    images[:, :, : IMAGE_PX // 2] = 1.0
    grid = np.asarray(image_grid(images, ["a"] * 8, colors=["#ff0000"] * 8))
    assert grid.shape == (2 * (IMAGE_PX + HEAD_PX) + GAP_PX // 2, 6 * (IMAGE_PX + GAP_PX), 4)
    top, left = HEAD_PX, GAP_PX // 2
    first = grid[top : top + IMAGE_PX, left : left + IMAGE_PX]
    assert (first[: IMAGE_PX // 2] == 255).all()
    assert (first[IMAGE_PX // 2 :] == (0, 0, 0, 255)).all()
    title = grid[:top, left : left + IMAGE_PX]
    assert (title[title[..., 3] == 255] == (255, 0, 0, 255)).all()
    assert (title[..., 3] == 255).any()
    second_row = grid[top + IMAGE_PX :]
    assert (second_row[..., 3] > 0).any()
    assert (second_row[:, 2 * (IMAGE_PX + GAP_PX) :] == 0).all()  # there are two images in it


def test_a_title_that_is_wider_than_its_image_keeps_both_ends() -> None:
    font = showcase._font()
    title = "a flower with a very long name (87%)"
    shown = showcase._shorten(title, font, IMAGE_PX)
    assert font.getlength(shown) <= IMAGE_PX
    assert shown.startswith("a flower")
    assert shown.endswith("(87%)")
    assert showcase._shorten("rose\n(87%)", font, IMAGE_PX) == "rose (87%)"


def test_an_image_that_cannot_be_written_whole_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figures" / "samples.png"
    save_image(Image.new("RGBA", (2, 3)), path)
    old = path.read_bytes()
    with Image.open(path) as image:
        assert image.size == (2, 3)

    def write_half(_: Image.Image, file: BinaryIO, _kind: str) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", write_half)
    with pytest.raises(OSError, match="No space left"):
        save_image(Image.new("RGBA", (4, 4)), path)
    assert [(p, p.read_bytes()) for p in path.parent.iterdir()] == [(path, old)]


def test_titles_have_the_color_of_text_in_plots() -> None:
    assert showcase.INK == plots.INK


def test_images_are_drawn_without_matplotlib_whose_import_would_delay_the_end(
    repository: Path,
) -> None:
    script = """
import sys, torch
from recipes.showcase import image_grid
image_grid(torch.rand(1, 3, 8, 8), ["a"])
print([name for name in sys.modules if name.startswith("matplotlib")])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
