"""Pictures for people: sample pictures with titles, a picture cut into patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from torch import Tensor

from unitransformer.config import ModelConfig
from unitransformer.objectives import IGNORED, Batch
from unitransformer.plots import INK, write_figure
from unitransformer.transformer import PatchEncoding, Transformer

__all__ = ["patch_figure", "image_grid", "write_figure"]


def image_grid(
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


@dataclass(frozen=True, kw_only=True)
class FilledMask:
    """One masked position: what was asked, answered and true."""

    context: str
    answer: str
    truth: str


@torch.no_grad()
def continue_tokens(
    network: Transformer,
    words: Sequence[int],
    *,
    num_words: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[int]:
    """`words` and `num_words` more, each drawn from the network's distribution.

    The context is cut from the left at the network's positions.
    """
    device = next(network.parameters()).device
    generator = torch.Generator("cpu").manual_seed(seed)
    out = list(words)
    for _ in range(num_words):
        context = torch.tensor([out[-network.config.num_positions :]], device=device)
        last = torch.tensor([[context.shape[1] - 1]], device=device)
        logits = network(context, last)[0, 0].float().cpu()
        chances = network.softmax(logits / temperature)
        out.append(int(torch.multinomial(chances, 1, generator=generator)))
    return out


def continue_text(
    network: Transformer, tokenizer: Tokenizer, prompt: Sequence[int], *, num_words: int, seed: int
) -> tuple[str, str]:
    """The prompt and what the network adds, as text."""
    words = continue_tokens(network, prompt, num_words=num_words, seed=seed)
    start = tokenizer.decode(list(prompt))
    return start, tokenizer.decode(words)[len(start) :]


@torch.no_grad()
def fill_masks(network: Transformer, tokenizer: Tokenizer, batch: Batch) -> list[FilledMask]:
    """The most likely word at every masked position of `batch`."""
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
            words = [tokenizer.id_to_token(word) or "?" for word in inputs.tolist()]
            words[position] = "____"
            filled.append(
                FilledMask(
                    context=" ".join(words[1:-1]),
                    answer=tokenizer.id_to_token(answer) or "?",
                    truth=tokenizer.id_to_token(target) or "?",
                )
            )
    return filled


@torch.no_grad()
def label_images(network: Transformer, pictures_BCSS: Tensor) -> tuple[list[int], list[float]]:
    """The most likely label of each picture, and its probability."""
    chances = network.softmax(network(pictures_BCSS).float())
    best = chances.max(dim=-1)
    return best.indices.tolist(), best.values.tolist()
