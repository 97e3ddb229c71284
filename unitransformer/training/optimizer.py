"""Builds AdamW with weight decay on matrices only."""

from collections.abc import Iterable

import torch
from torch import Tensor

from unitransformer.config import RunConfig
from unitransformer.parallel.fsdp1 import plain_name
from unitransformer.transformer import Transformer


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]], config: RunConfig, *, fused: bool = True
) -> torch.optim.AdamW:
    """Returns AdamW without weight decay on biases, norms and single vectors.

    Args:
        fused: one kernel for many parameters. Otherwise a few kernels for many (foreach) on a GPU,
            and a loop over the parameters on a CPU.
    """
    with torch.device("meta"):
        full = Transformer(config.model).named_parameters()
    matrices = {name for name, p in full if sum(size > 1 for size in p.shape) >= 2}
    optimizer = config.optimizer
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in named_parameters:  # they may be sharded
        (decayed if plain_name(name) in matrices else others).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=fused or None,  # False would also rule out foreach, and leave the loop on a GPU
    )
