"""The only file that says `torch.compile`."""

import torch

from unitransformer.config import Compile
from unitransformer.objectives import Objective


def compile_objective(objective: Objective, mode: Compile) -> None:
    """Compile network and loss in place, as one graph; `off` leaves them alone."""
    if mode != "off":
        objective.compile(mode=None if mode == "default" else mode, fullgraph=True)


def reset_compiler() -> None:
    """Forget every compiled graph: the next run in this process starts cold."""
    torch.compiler.reset()
