"""The only file that says `torch.compile`."""

from typing import Any

import torch

from unitransformer.config import Compile
from unitransformer.objectives import Objective


def compile_objective(objective: Objective, mode: Compile, *, by_layer: bool) -> None:
    """Compile in place; `off` leaves everything alone.

    Args:
        by_layer: each layer by itself, so that its weights can be gathered before it and let go
            after it; otherwise network and loss as one graph.
    """
    if mode == "off":
        return
    options: dict[str, Any] = {"mode": None if mode == "default" else mode, "fullgraph": True}
    if not by_layer:
        objective.compile(**options)
        return
    for layer in objective.network.transformer_layers:
        # Not `layer.compile()`, which takes in the hooks that gather the weights.
        layer.forward = torch.compile(layer.forward, **options)
