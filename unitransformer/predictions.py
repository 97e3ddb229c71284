"""What a trained network says: a text continued, masked words filled, pictures labelled."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from unitransformer.objectives import IGNORED, Batch
from unitransformer.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class FilledWord:
    """One masked position: what was asked, answered and true."""

    context: str
    answer: str
    truth: str


@torch.no_grad()
def continue_words(
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
    words = continue_words(network, prompt, num_words=num_words, seed=seed)
    start = tokenizer.decode(list(prompt))
    return start, tokenizer.decode(words)[len(start) :]


@torch.no_grad()
def fill_masks(network: Transformer, tokenizer: Tokenizer, batch: Batch) -> list[FilledWord]:
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
                FilledWord(
                    context=" ".join(words[1:-1]),
                    answer=tokenizer.id_to_token(answer) or "?",
                    truth=tokenizer.id_to_token(target) or "?",
                )
            )
    return filled


@torch.no_grad()
def label_pictures(network: Transformer, pictures_BCSS: Tensor) -> tuple[list[int], list[float]]:
    """The most likely label of each picture, and its probability."""
    chances = network.softmax(network(pictures_BCSS).float())
    best = chances.max(dim=-1)
    return best.indices.tolist(), best.values.tolist()
