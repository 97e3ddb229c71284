"""Counts operators and their bytes, for fake tensors of a GPU as for real ones."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that a GPU would run, and the bytes that they read and write.

    A view is no such operator, and neither is one without a tensor. A tensor counts with its
    elements, but never with more than its memory has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = list(_distinct((args, kwargs, result)))
        is_work = tensors and not func.is_view and func.namespace == "aten"
        if is_work and func is not torch.ops.aten._local_scalar_dense.default:
            self.names.append(str(func))
            self.num_bytes += sum(
                min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors
            )
        return result


def _distinct(values: Any) -> Iterator[Tensor]:
    seen: set[int] = set()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield leaf
