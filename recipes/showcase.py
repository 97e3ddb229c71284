"""Shows what a network predicts: continued text, filled masks, and figures of labelled images."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from torch import Tensor

from unitransformer.config import ModelConfig
from unitransformer.files import open_atomically
from unitransformer.objectives import IGNORED, Batch
from unitransformer.transformer import PatchEncoding, Transformer

COLUMNS = 6  # of images
IMAGE_PX, GAP_PX, TITLE_PX = 160, 16, 14
HEAD_PX = 34  # above each image, for its title
PATCHES_PX = 560  # side of all patches without the gaps; larger images keep their size
INK = "#7b7b7b"  # that of `unitransformer.plots`, which imports matplotlib
TEMPERATURE = 0.8  # of sampled text


def image_grid(images: Tensor, titles: Sequence[str], *, colors: Sequence[str] = ()) -> Image.Image:
    """Draws (B, C, S, S) images in rows, each with a title, on a transparent ground."""
    cell, height = IMAGE_PX + GAP_PX, HEAD_PX + IMAGE_PX
    rows = -(-len(images) // COLUMNS)
    grid = Image.new("RGBA", (COLUMNS * cell, rows * height + GAP_PX // 2))
    draw, font = ImageDraw.Draw(grid), _font()
    for index, image in enumerate(images):
        row, column = divmod(index, COLUMNS)
        left, top = column * cell + GAP_PX // 2, row * height + HEAD_PX
        is_small = image.shape[-1] < IMAGE_PX
        resample = Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS
        pixels = Image.fromarray(_pixels(image, image))
        grid.paste(pixels.resize((IMAGE_PX, IMAGE_PX), resample), (left, top))
        place = (left + IMAGE_PX / 2, top - TITLE_PX / 2)
        title = _shorten(titles[index], font, IMAGE_PX)
        draw.text(place, title, colors[index] if colors else INK, font, anchor="ms")
    return grid


def patch_figure(image: Tensor, model: ModelConfig) -> Image.Image:
    """Draws a (C, S, S) image as the patches that the network reads, with gaps between them."""
    assert model.image_size is not None
    assert model.patch_size is not None
    patches = PatchEncoding(model.patch_size)(image.unsqueeze(0))[0]
    side, zoom = model.image_size // model.patch_size, max(1, PATCHES_PX // model.image_size)
    pixels = _pixels(patches.view(side, side, -1, model.patch_size, model.patch_size), image)
    patch = pixels.repeat(zoom, axis=2).repeat(zoom, axis=3)
    width = model.patch_size * zoom
    gap = -(-width // 12)
    canvas = np.zeros((side, width + gap, side, width + gap, 4), np.uint8)
    canvas[:, :width, :, :width] = patch.transpose(0, 2, 1, 3, 4)
    length = side * (width + gap)
    return Image.fromarray(canvas.reshape(length, length, 4)[:-gap, :-gap])


def save_image(image: Image.Image, path: Path) -> None:
    """Writes `image` as PNG; the file at `path` is complete or, after a failure, the old one."""
    with open_atomically(path) as file:
        image.save(file, "png")


def _pixels(images: Tensor, whole: Tensor) -> Any:
    """Returns (..., C, H, W) values as (..., H, W, 4) bytes, scaled to the range of `whole`."""
    low, high = float(whole.min()), float(whole.max())
    values = np.moveaxis(images.float().cpu().numpy(), -3, -1)
    scaled = (values if values.shape[-1] == 3 else values[..., :1]) - low
    pixels = np.full((*values.shape[:-1], 4), 255, np.uint8)
    pixels[..., :3] = np.rint(scaled * (255 / max(high - low, 1e-6)))
    return pixels


def _font() -> ImageFont.FreeTypeFont:
    """Loads matplotlib's font, as in other figures, without importing matplotlib."""
    package = importlib.util.find_spec("matplotlib")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, TITLE_PX)


def _shorten(title: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Puts a title into one line, and leaves out its middle if it is wider than an image."""
    title = shown = " ".join(title.split())
    half = len(title) // 2
    while font.getlength(shown) > width and half:
        half -= 1
        shown = f"{title[:half]}…{title[len(title) - half :]}"
    return shown


@torch.no_grad()
def continue_text(
    network: Transformer, tokenizer: Tokenizer, prompt: Sequence[int], *, num_tokens: int
) -> tuple[str, str]:
    """Returns the prompt and its continuation as text, sampled token by token.

    The network sees only the last tokens that fit its positions.
    """
    device = next(network.parameters()).device
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = list(prompt)
    for _ in range(num_tokens):
        context = torch.tensor([tokens[-network.config.num_positions :]], device=device)
        last = torch.tensor([[context.shape[1] - 1]], device=device)
        logits = network(context, last)[0, 0].float().cpu()
        probabilities = network.softmax(logits / TEMPERATURE)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    start = tokenizer.decode(list(prompt))
    return start, tokenizer.decode(tokens)[len(start) :]


@torch.no_grad()
def fill_masks(network: Transformer, tokenizer: Tokenizer, batch: Batch) -> list[str]:
    """Returns the context, the most likely and the true token of every masked position."""
    positions_BK = batch["positions"]
    answers_BK = network(batch["inputs"], positions_BK).argmax(-1)
    filled = []
    for inputs, positions, answers, targets in zip(
        batch["inputs"], positions_BK, answers_BK, batch["targets"], strict=True
    ):
        for position, answer, target in zip(
            positions.tolist(), answers.tolist(), targets.tolist(), strict=True
        ):
            if target == IGNORED:
                continue
            tokens = [tokenizer.id_to_token(token) or "?" for token in inputs.tolist()]
            tokens[position] = "____"
            prediction, truth = (tokenizer.id_to_token(i) or "?" for i in (answer, target))
            context = " ".join(tokens[1:-1])
            filled.append(f"{context}\n    -> {prediction!r} (was {truth!r})")
    return filled


@torch.no_grad()
def label_images(network: Transformer, images_BCSS: Tensor) -> tuple[list[int], list[float]]:
    """Returns the most likely label of each image, and its probability."""
    best = network.softmax(network(images_BCSS).float()).max(dim=-1)
    return best.indices.tolist(), best.values.tolist()
