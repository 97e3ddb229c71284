"""Trivial baselines: unigram entropy, majority class."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unitransformer.config import RunConfig
from unitransformer.data.sampler import ValidationSampler
from unitransformer.data.sources import BatchDataset
from unitransformer.objectives import IGNORED

COUNTED_AT_ONCE = 1 << 20  # words


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What knowing nothing but frequencies reaches on the validation samples."""

    name: str
    loss: float | None = None  # nats
    accuracy: float | None = None


def count_tokens(words: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    """How often each word occurs; block by block, as the words may not fit in memory."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(words), COUNTED_AT_ONCE):
        counts += np.bincount(words[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    return counts


def unigram_baseline(train: NDArray[Any], validation: Tensor, vocab_size: int) -> Baseline:
    """Cross entropy of the training words' frequencies (plus one) on the words of validation."""
    counts = count_tokens(train, vocab_size) + 1.0
    nats = -np.log(counts / counts.sum())
    return Baseline(name="unigram entropy", loss=float(nats[validation.numpy()].mean()))


def most_frequent_baseline(name: str, validation: Tensor, answer: int) -> Baseline:
    """Accuracy of giving `answer` to every question of validation."""
    return Baseline(name=name, accuracy=float((validation == answer).float().mean()))


def validation_targets(config: RunConfig, samples: BatchDataset) -> Tensor:
    """The right answers to what every rank together is asked in validation."""
    orders = [
        ValidationSampler(config, len(samples), rank=rank)
        for rank in range(config.parallel.world_size)
    ]
    targets = [samples[picks]["targets"].reshape(-1) for order in orders for picks in order]
    answers = torch.cat(targets)
    return answers[answers != IGNORED]
