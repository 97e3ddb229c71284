"""Shows what a network predicts: continued text, filled masks, and figures of labelled images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from unitransformer.config import ModelConfig
from unitransformer.objectives import IGNORED, Batch
from unitransformer.transformer import PatchEncoding, Transformer

if TYPE_CHECKING:  # importing it loads matplotlib, which only images need
    from matplotlib.figure import Figure

COLUMNS = 6  # of images
TEMPERATURE = 0.8  # of sampled text


def image_grid(images: Tensor, titles: Sequence[str], *, colors: Sequence[str] = ()) -> "Figure":
    """Draws (B, C, S, S) images in rows, each with a title."""
    from matplotlib import pyplot as plt

    from unitransformer.plots import INK

    rows = -(-len(images) // COLUMNS)
    figure, grid = plt.subplots(
        rows, COLUMNS, figsize=(1.6 * COLUMNS, 1.9 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for index, (axes, image) in enumerate(zip(grid.flat, images, strict=False)):
        axes.imshow(_pixels(image))
        axes.set_title(titles[index], fontsize=9, color=colors[index] if colors else INK)
    return figure


def patch_figure(image: Tensor, model: ModelConfig) -> "Figure":
    """Draws a (C, S, S) image as the patches that the network reads."""
    from matplotlib import pyplot as plt

    assert model.image_size is not None
    assert model.patch_size is not None
    patches = PatchEncoding(model.patch_size)(image.unsqueeze(0))[0]
    side = model.image_size // model.patch_size
    low, high = float(image.min()), float(image.max())
    figure, grid = plt.subplots(
        side, side, figsize=(5, 5), squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08}
    )
    for axes, patch in zip(grid.flat, patches, strict=True):
        shape = (model.num_channels, model.patch_size, model.patch_size)
        axes.imshow(_pixels(patch.view(shape), low, high))
        axes.axis("off")
    return figure


def _pixels(image: Tensor, low: float | None = None, high: float | None = None) -> Any:
    low = float(image.min()) if low is None else low
    high = float(image.max()) if high is None else high
    scaled = (image.float().cpu() - low) / max(high - low, 1e-6)
    rows = scaled.permute(1, 2, 0).clamp(0, 1)
    return (rows if rows.shape[-1] == 3 else rows[..., :1].expand(-1, -1, 3)).numpy()


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
