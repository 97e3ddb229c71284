"""Computes trivial baselines: unigram entropy, most frequent token, majority class."""

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

CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a guess by frequency in the training data reaches on the validation samples."""

    name: str
    loss: float | None = None  # nats
    accuracy: float | None = None


def count_tokens(tokens: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    """Returns how often each token occurs; reads in chunks, as the text may not fit in memory."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        counts += np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=vocab_size)
    return counts


def unigram_baseline(counts: NDArray[np.int64], validation: Tensor) -> Baseline:
    """Returns the cross entropy of the training frequencies (add-one) on validation tokens."""
    smoothed = counts + 1.0
    nats = -np.log(smoothed / smoothed.sum())
    return Baseline(name="unigram entropy", loss=float(nats[validation.numpy()].mean()))


def most_frequent_baseline(name: str, validation: Tensor, prediction: int) -> Baseline:
    """Returns the accuracy of one constant prediction on the validation targets."""
    return Baseline(name=name, accuracy=float((validation == prediction).float().mean()))


def validation_targets(config: RunConfig, dataset: BatchDataset) -> Tensor:
    """Returns the targets of the validation batches of all ranks together, without ignored ones."""
    samplers = [
        ValidationSampler(config, len(dataset), rank=rank)
        for rank in range(config.parallel.world_size)
    ]
    batches = [dataset[indices] for sampler in samplers for indices in sampler]
    targets = torch.cat([batch["targets"].reshape(-1) for batch in batches])
    return targets[targets != IGNORED]
