"""The only file that says `torch.compile`."""

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
    parts = objective.network.transformer_layers if by_layer else [objective]
    for part in parts:
        part.compile(mode=None if mode == "default" else mode, fullgraph=True)
