"""Samples of text: next words for GPT, masked words for BERT.

Sample `i` of pass `epoch` is a pure function of seed, epoch and `i`.

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
from unitransformer.data.tokenizer import special_tokens
from unitransformer.objectives import IGNORED, Batch


class NextTokens:
    """GPT: stretches of T + 1 words; each word is predicted from those before it."""

    def __init__(self, words: NDArray[Any], length: int) -> None:
        self.words, self.length = words, length

    def __len__(self) -> int:
        return (len(self.words) - 1) // self.length

    def __getitem__(self, picks: BatchIndices) -> Batch:
        _, indices = picks
        rows = _rows(self.words, indices * self.length, self.length + 1)
        return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}


class MaskedTokens:
    """BERT: [CLS], T - 2 words, [SEP]; a fixed share of the words has to be found.

    Of the chosen positions 80 % show [MASK], 10 % a random word, 10 % the word itself (Devlin et
    al. 2019, section 3.1). Their number is the same in every sample, so shapes never change.
    """

    def __init__(self, config: RunConfig, words: NDArray[Any], vocab_size: int) -> None:
        self.words, self.vocab_size = words, vocab_size
        self.length = config.sequence_length
        self.num_masked = count_predicted_positions(config)
        self.seed = config.seed
        names = special_tokens("wordpiece")
        self.num_special = len(names)
        self.cls, self.sep, self.mask = (names.index(n) for n in ("[CLS]", "[SEP]", "[MASK]"))

    def __len__(self) -> int:
        return len(self.words) // (self.length - 2)

    def __getitem__(self, picks: BatchIndices) -> Batch:
        epochs, indices = picks
        body = _rows(self.words, indices * (self.length - 2), self.length - 2)
        ends = body.new_ones(len(body), 1)
        inputs = torch.cat([ends * self.cls, body, ends * self.sep], dim=1)
        is_special = (inputs < self.num_special).numpy()
        # Three independent draws a position: which are chosen, what they show, which random word.
        draws = uniform(
            self.seed, torch.from_numpy(epochs), torch.from_numpy(indices), 3 * self.length
        )
        chance = draws.numpy().reshape(-1, 3, self.length)
        rank_of = np.where(is_special, 2.0, chance[:, 0]).argsort(axis=1, kind="stable")
        positions = torch.from_numpy(np.sort(rank_of[:, : self.num_masked], axis=1))
        targets = inputs.gather(1, positions)
        fate = torch.from_numpy(chance[:, 1]).gather(1, positions)
        draw = torch.from_numpy(chance[:, 2]).gather(1, positions)
        span = self.vocab_size - self.num_special
        random_word = (draw * span).long() + self.num_special
        shown = torch.where(fate < 0.8, self.mask, torch.where(fate < 0.9, random_word, targets))
        # A stretch of separators may hold too few words: special positions are no questions.
        is_word = targets >= self.num_special
        inputs = inputs.scatter(1, positions, torch.where(is_word, shown, targets))
        targets = torch.where(is_word, targets, IGNORED)
        return {"inputs": inputs, "targets": targets, "positions": positions}


def _rows(words: NDArray[Any], starts: NDArray[np.int64], length: int) -> Tensor:
    rows = words[starts[:, None] + np.arange(length)]
    return torch.from_numpy(rows.astype(np.int64))
