"""Chooses the samples of each batch: the same global batches on any number of devices.

The samples of optimizer step `s` are a pure function of the seed and `s`; ranks only divide them.
"""

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from unitransformer.config import RunConfig

# The epoch and the index of each sample of a batch.
BatchIndices = tuple[NDArray[np.int64], NDArray[np.int64]]
VALIDATION_EPOCH = -1  # the masks of validation samples never change


def permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the order of the samples in pass `epoch`, each sample once."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


class TrainSampler(Sampler[BatchIndices]):
    """Yields the micro-batches of one rank from optimizer step `start_step` to the last.

    There is one stream of samples: pass after pass over the data, each shuffled differently, cut
    into global batches. A global batch holds the same samples however many ranks share it.
    """

    def __init__(
        self, config: RunConfig, num_samples: int, *, rank: int, start_step: int = 0
    ) -> None:
        self.config, self.num_samples = config, num_samples
        self.rank, self.start_step = rank, start_step

    def __len__(self) -> int:
        """Micro-batches of the whole run, also of a resumed one, as Lightning expects."""
        return self.config.max_steps * self.config.accumulate

    def __iter__(self) -> Iterator[BatchIndices]:
        config = self.config
        world, size = config.parallel.world_size, config.batch_size
        order_of = functools.lru_cache(maxsize=2)(
            lambda epoch: permutation(self.num_samples, config.seed, epoch)
        )
        for step in range(self.start_step, config.max_steps):
            for micro_batch in range(config.accumulate):
                first = step * config.global_batch_size + (micro_batch * world + self.rank) * size
                epochs, offsets = np.divmod(np.arange(first, first + size), self.num_samples)
                pairs = zip(epochs.tolist(), offsets.tolist(), strict=True)
                yield epochs, np.array([order_of(epoch)[offset] for epoch, offset in pairs])


class ValidationSampler(Sampler[BatchIndices]):
    """Yields one rank's share of the validation batches, the same in every run whatever its seed.

    Samples are shuffled before the first batches are taken, because neighbors in a text are alike.
    """

    def __init__(self, config: RunConfig, num_samples: int, *, rank: int) -> None:
        world = config.parallel.world_size
        if num_samples < world:
            raise ValueError(
                f"data {config.data.source} has {num_samples} validation samples for {world} "
                "devices; use more data or fewer devices"
            )
        self.size = min(config.batch_size, num_samples // world)
        self.num_batches = min(config.validation_batches, num_samples // (self.size * world))
        self.world, self.rank = world, rank
        self.order = permutation(num_samples, 0, 0)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[BatchIndices]:
        for batch in range(self.num_batches):
            first = (batch * self.world + self.rank) * self.size
            indices = self.order[first : first + self.size]
            yield np.full_like(indices, VALIDATION_EPOCH), indices
