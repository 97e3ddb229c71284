"""Text samples: next-token prediction for GPT, masked tokens for BERT.

Sample `i` of pass `epoch` is a pure function of the seed, `epoch` and `i`.

B batch | T positions | K masked positions
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_predicted_positions
from unitransformer.data.counter_rng import uniform
from unitransformer.data.sampler import BatchIndices
from unitransformer.data.tokenizer import SPECIAL_TOKENS
from unitransformer.objectives import IGNORED, Batch


class NextTokens:
    """GPT: spans of T + 1 tokens; each token is predicted from those before it."""

    def __init__(self, tokens: NDArray[Any], length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, batch: BatchIndices) -> Batch:
        rows = _spans(self.tokens, batch[1] * self.length, self.length + 1)
        return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}


class MaskedTokens:
    """BERT: [CLS], T - 2 tokens, [SEP]; K positions per sample are to be predicted.

    Of these, 80 % show [MASK], 10 % a random token and 10 % their own token (Devlin et al. 2019,
    section 3.1).
    """

    def __init__(self, config: RunConfig, tokens: NDArray[Any], vocab_size: int) -> None:
        self.tokens, self.vocab_size = tokens, vocab_size
        self.length = config.sequence_length
        self.num_masked = count_predicted_positions(config)
        self.seed = config.seed
        names = SPECIAL_TOKENS["wordpiece"]
        self.num_special = len(names)
        self.cls, self.sep, self.mask = (names.index(n) for n in ("[CLS]", "[SEP]", "[MASK]"))

    def __len__(self) -> int:
        return len(self.tokens) // (self.length - 2)

    def __getitem__(self, batch: BatchIndices) -> Batch:
        epochs, indices = batch
        body = _spans(self.tokens, indices * (self.length - 2), self.length - 2)
        ends = body.new_ones(len(body), 1)
        inputs = torch.cat([ends * self.cls, body, ends * self.sep], dim=1)
        is_special = (inputs < self.num_special).numpy()
        # Three random numbers per position: whether to predict it, what it shows, which token.
        random = uniform(
            self.seed, torch.from_numpy(epochs), torch.from_numpy(indices), 3 * self.length
        ).reshape(-1, 3, self.length)
        order = np.where(is_special, 2.0, random[:, 0].numpy()).argsort(axis=1, kind="stable")
        positions = torch.from_numpy(np.sort(order[:, : self.num_masked], axis=1))
        targets = inputs.gather(1, positions)
        kind = random[:, 1].gather(1, positions)
        num_ordinary = self.vocab_size - self.num_special
        random_token = (random[:, 2].gather(1, positions) * num_ordinary).long() + self.num_special
        shown = torch.where(kind < 0.8, self.mask, torch.where(kind < 0.9, random_token, targets))
        # If a sample has too few ordinary tokens, special ones are selected: they do not count.
        is_ordinary = targets >= self.num_special
        inputs = inputs.scatter(1, positions, torch.where(is_ordinary, shown, targets))
        targets = torch.where(is_ordinary, targets, IGNORED)
        return {"inputs": inputs, "targets": targets, "positions": positions}


def _spans(tokens: NDArray[Any], starts: NDArray[np.int64], length: int) -> Tensor:
    spans = tokens[starts[:, None] + np.arange(length)]
    return torch.from_numpy(spans.astype(np.int64))
