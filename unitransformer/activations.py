"""Activation checkpointing: which results of a layer's forward pass are kept for the backward."""

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from unitransformer.config import ActivationCheckpointing
from unitransformer.objectives import Objective

_ATEN = torch.ops.aten
# What costs most to compute again for the memory it takes: matrix products and attention.
_EXPENSIVE = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_fused_attention_overrideable.default,
}


def checkpoint_activations(objective: Objective, mode: ActivationCheckpointing) -> None:
    """Keep less of every layer: `full` its input alone, `selective` its matrix products as well.

    What is not kept is computed again in the backward pass; the loss and the gradients stay the
    same. Comes before compiling and sharding. Names of parameters do not change.
    """
    if mode == "off":
        return
    for layer in objective.network.transformer_layers:
        _checkpoint_layer(layer, mode)


def _checkpoint_layer(layer: nn.Module, mode: ActivationCheckpointing) -> None:
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _choose)
    compute = layer.forward

    def forward(*inputs: Any) -> Any:  # a closure, which the compiler sees through
        return checkpoint(compute, *inputs, **options)

    layer.forward = forward


def _choose(_: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if operation in _EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
