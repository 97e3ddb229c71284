"""Makes fake tensors on the CPU go through the operators that a GPU would choose.

Torch's CPU build has no autograd for fake CUDA tensors, and its CUDA build needs a driver for it.
Fake CPU tensors need neither. Where CPU and GPU run different operators in a training step, the
functions below call those of a GPU: they save other tensors for the backward pass.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _foreach_utils

_ATEN: Any = torch.ops.aten


@contextlib.contextmanager
def gpu_choices() -> Iterator[None]:
    """Inside the block, the CPU chooses operators as a GPU does; only for fake tensors."""
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", _attention),
        mock.patch.object(functional, "layer_norm", _layer_norm),
        mock.patch.object(functional, "dropout", _dropout),
        mock.patch.object(
            _foreach_utils, "_get_foreach_kernels_supported_devices", return_value=["cpu", "cuda"]
        ),
    ):
        yield


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Flash attention in 16 bits and without a mask, otherwise memory-efficient attention."""
    attended: Tensor
    if q.dtype != torch.float32 and attn_mask is None:
        attended, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v, is_causal=is_causal)
        return attended
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:-1], k.shape[-2])
    is_training = torch.is_grad_enabled() and q.requires_grad
    attended, *_ = _ATEN._scaled_dot_product_efficient_attention(
        q, k, v, bias, is_training, is_causal=is_causal
    )
    return attended


_torch_layer_norm = functional.layer_norm
_torch_dropout = functional.dropout


def _layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The autocast of a GPU computes norms in float32, that of a CPU as they come."""
    if torch.is_autocast_enabled("cpu"):
        x = x.float()
        weight = None if weight is None else weight.float()
        bias = None if bias is None else bias.float()
    return _torch_layer_norm(x, normalized_shape, weight, bias, eps)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """A GPU saves one byte per number, a CPU the factor."""
    if not training or p == 0 or inplace:
        return _torch_dropout(x, p, training, inplace)
    dropped: Tensor = torch.native_dropout(x, p, True)[0]
    return dropped
