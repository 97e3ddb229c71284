"""Activation checkpointing: which results of a layer's forward pass are kept for the backward."""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from unitransformer.config import ActivationCheckpointing
from unitransformer.objectives import Objective

NO_BACKWARD = -1  # the number of autograd's task outside of a backward pass
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


def _checkpoint_layer(layer: Any, mode: ActivationCheckpointing) -> None:
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _choose)
    compute = layer.forward

    def compute_and_note(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != NO_BACKWARD:
            layer.is_recomputed = True
        return compute(*inputs)

    def forward(*inputs: Any) -> Any:  # a closure, which the compiler sees through
        return checkpoint(compute_and_note, *inputs, **options)

    layer.forward = forward
    layer.is_recomputed = False


def count_recomputed(objective: Objective, *, is_compiled: bool) -> int:
    """Layers of which something was computed again in a backward pass.

    Args:
        is_compiled: nothing can be seen inside a graph then: layers that are checkpointed count,
            which it has taken in as they are, or was not made.
    """
    layers = objective.network.transformer_layers
    if is_compiled:
        return sum(hasattr(layer, "is_recomputed") for layer in layers)
    return sum(bool(getattr(layer, "is_recomputed", False)) for layer in layers)


def _choose(_: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if operation in _EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
