"""Allocates and initializes the weights of a network on the meta device, module by module."""

import torch
from torch import Tensor, nn

from unitransformer.transformer import InitialWeights, PositionalEncoding, Transformer


class Materializer:
    """Allocates and initializes the weights of one module, without those of its children.

    Call it once for every module of the network. A matrix that two modules share stays shared.
    """

    def __init__(self, network: Transformer, weights: InitialWeights, device: torch.device) -> None:
        # Keyed by parameter, because the id of a freed parameter may be reused.
        self._names: dict[Tensor, str] = {p: name for name, p in network.named_parameters()}
        self._made: dict[Tensor, nn.Parameter] = {}
        self._weights = weights
        self._device = device

    def __call__(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in self._names:
                module.register_parameter(name, self._make(parameter))
        if isinstance(module, PositionalEncoding):
            module.to_empty(device=self._device)
            module.init_weights()

    def _make(self, parameter: Tensor) -> nn.Parameter:
        if parameter not in self._made:
            values = self._weights(self._names[parameter], parameter)
            self._made[parameter] = nn.Parameter(values.to(self._device, parameter.dtype))
        return self._made[parameter]
