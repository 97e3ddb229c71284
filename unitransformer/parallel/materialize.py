"""Memory and first values for the weights of a network on the meta device, module by module."""

import torch
from torch import Tensor, nn

from unitransformer.transformer import PositionalEncoding, Transformer, Values


class Materialise:
    """Gives the weights of one module, not those of its children, memory and values.

    Every module of the network is to be given to it once. A matrix that two modules share is made
    once and stays shared.
    """

    def __init__(self, network: Transformer, values: Values, device: torch.device) -> None:
        # The parameters themselves, not their ids, which would be given to others.
        self._names: dict[Tensor, str] = {p: name for name, p in network.named_parameters()}
        self._made: dict[Tensor, nn.Parameter] = {}
        self._values = values
        self._device = device

    def __call__(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in self._names:
                module.register_parameter(name, self._make(parameter))
        if isinstance(module, PositionalEncoding):
            module.to_empty(device=self._device)
            module.initialise()

    def _make(self, parameter: Tensor) -> nn.Parameter:
        if parameter not in self._made:
            values = self._values(self._names[parameter], parameter)
            placed = values.to(device=self._device, dtype=parameter.dtype)
            self._made[parameter] = nn.Parameter(placed)
        return self._made[parameter]
