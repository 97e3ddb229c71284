"""Unitransformer/training/optimizer.py."""

from collections.abc import Iterable

import torch
from torch import Tensor

from unitransformer.config import RunConfig
from unitransformer.transformer import Transformer


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]], config: RunConfig, *, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, none on biases, norms and single vectors.

    Args:
        named_parameters: by plain names; how they are divided does not matter.
    """
    with torch.device("meta"):
        whole = Transformer(config.model).named_parameters()
    matrices = {name for name, parameter in whole if _is_matrix(parameter)}
    optimizer = config.optimizer
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in named_parameters:
        (decayed if name in matrices else others).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=fused,
    )


def _is_matrix(parameter: Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) >= 2
