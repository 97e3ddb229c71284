"""Activation checkpointing: which results of a layer's forward pass are kept for the backward."""

import functools
from typing import Any

import torch
from torch.utils import checkpoint

from unitransformer.config import ActivationCheckpointing
from unitransformer.objectives import Objective

NO_BACKWARD = -1  # autograd's task id outside of a backward pass
_ATEN = torch.ops.aten
# Matrix products and attention: the operators that cost most to recompute per byte saved.
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
    """Keeps only the input of every layer (`full`), or its matrix products as well (`selective`).

    The rest is recomputed in the backward pass, with the same loss and gradients. Call it before
    compiling and sharding. Parameter names do not change.
    """
    if mode == "off":
        return
    # Only dropout draws random numbers, and saving their state takes time in every layer.
    has_dropout = objective.network.config.dropout > 0
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout}
    if mode == "selective":
        contexts = checkpoint.create_selective_checkpoint_contexts
        options["context_fn"] = functools.partial(contexts, _policy_of)
    for layer in objective.network.transformer_layers:
        _checkpoint_layer(layer, options)


def _checkpoint_layer(layer: Any, options: dict[str, Any]) -> None:
    compute = layer.forward

    def compute_and_note(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != NO_BACKWARD:
            layer.is_recomputed = True
        return compute(*inputs)

    def forward(*inputs: Any) -> Any:  # a closure, because the compiler can trace it
        return checkpoint.checkpoint(compute_and_note, *inputs, **options)

    layer.forward = forward
    layer.is_recomputed = False


def count_recomputed(objective: Objective, *, is_compiled: bool) -> int:
    """Returns the number of layers that were recomputed in a backward pass.

    Recomputation inside a compiled graph is invisible. Checkpointed layers are counted there,
    because with `fullgraph` the graph contains them or was never built.
    """
    layers = objective.network.transformer_layers
    if is_compiled:
        return sum(hasattr(layer, "is_recomputed") for layer in layers)
    return sum(bool(getattr(layer, "is_recomputed", False)) for layer in layers)


def _policy_of(_: Any, operator: Any, *_args: Any, **_kwargs: Any) -> checkpoint.CheckpointPolicy:
    policy = checkpoint.CheckpointPolicy
    return policy.MUST_SAVE if operator in _EXPENSIVE else policy.PREFER_RECOMPUTE
