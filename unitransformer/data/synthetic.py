"""Random samples, generated on the device so that loading data does not limit the speed."""

import math

import torch

from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_predicted_positions
from unitransformer.data.counter_rng import uniform
from unitransformer.data.sampler import BatchIndices
from unitransformer.objectives import Batch


class Synthetic:
    """Returns only indices; `fill` generates the samples on the device."""

    def __init__(self, config: RunConfig, num_samples: int) -> None:
        self.config, self.num_samples = config, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, batch: BatchIndices) -> Batch:
        indices = torch.from_numpy(batch[1])
        return {"inputs": indices, "targets": indices}

    def fill(self, batch: Batch, device: torch.device) -> Batch:
        """Returns random samples on `device`, each a function of the run's seed and its index."""
        config, indices = self.config, batch["inputs"].to(device, non_blocking=True)
        model, length = config.model, config.sequence_length
        if model.image_size is not None:
            shape = (model.num_channels, model.image_size, model.image_size)
            size = math.prod(shape)
            random = uniform(config.seed, 0, indices, size + 1)
            images = (random[:, :size] - 0.5) * math.sqrt(12)  # mean 0, variance 1
            labels = (random[:, size] * model.num_classes).long()
            return {"inputs": images.float().reshape(-1, *shape), "targets": labels}
        random = uniform(config.seed, 0, indices, 2 * length + 1)
        tokens = (random[:, : length + 1] * model.num_classes).long()
        if config.recipe == "gpt":
            return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        positions = random[:, length + 1 :].argsort(dim=1)[:, : count_predicted_positions(config)]
        inputs = tokens[:, :-1]
        return {"inputs": inputs, "targets": inputs.gather(1, positions), "positions": positions}
