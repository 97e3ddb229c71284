"""Compiles the network. The only file that calls `torch.compile`."""

from typing import Any

import torch

from unitransformer.config import Compile
from unitransformer.objectives import Objective


def compile_objective(objective: Objective, mode: Compile, *, by_layer: bool) -> None:
    """Compiles in place, unless `mode` is "off".

    Args:
        by_layer: compile each layer on its own, so that a strategy can gather its weights before
            it and free them after it; otherwise network and loss become one graph.
    """
    if mode == "off":
        return
    options: dict[str, Any] = {"mode": None if mode == "default" else mode, "fullgraph": True}
    if not by_layer:
        objective.compile(**options)
        return
    for layer in objective.network.transformer_layers:
        # Not `layer.compile()`, which would compile the hooks that gather the weights as well.
        layer.forward = torch.compile(layer.forward, **options)
