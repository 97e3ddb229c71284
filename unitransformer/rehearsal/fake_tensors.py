"""What torch needs to build and train a network of fake tensors, which hold no numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes


def outside_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that runs on real tensors: a mesh reads its ranks."""

    def called(*arguments: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **options)

    return called


@torch.no_grad()
def apply_to_fakes(
    self: nn.Module,
    function: Callable[[Tensor], Tensor],
    recurse: bool = True,  # noqa: ARG001
) -> nn.Module:
    """Replaces `nn.Module._apply` for fake tensors, which torch would swap, and fail."""
    for child in self.children():
        child._apply(function)  # type: ignore[no-untyped-call]
    for name, parameter in self._parameters.items():
        if parameter is not None:
            values = function(parameter)
            # The data of a DTensor are in its local tensor, which `data` does not reach.
            if values.device == parameter.device and not isinstance(parameter, DTensor):
                parameter.data = values
            elif values is not parameter:
                self._parameters[name] = nn.Parameter(values, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self
