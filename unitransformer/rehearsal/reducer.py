"""DDP's reducer for tensors without numbers: the one in C++ reads their memory.

DDP itself is torch's. Buckets are formed by the function that torch's reducer calls, from the same
order and limits, and one all-reduce is called for each as soon as its last gradient is there.
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import distributed


@contextlib.contextmanager
def reducer_of_fakes() -> Iterator[None]:
    """Inside the block, DDP reduces fake gradients."""
    with (
        mock.patch.object(torch.distributed, "Reducer", _Reducer),
        mock.patch.object(torch.distributed, "Logger", _Logger),
        # Both compare or send what rank 0 has, when DDP is built.
        mock.patch.object(distributed, "_verify_param_shape_across_processes", _do_nothing),
        mock.patch.object(distributed, "_sync_module_states", _do_nothing),
    ):
        yield


class _Bucket:
    """Gradients that one all-reduce sums; gradients of parameters are views of it."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        first = parameters[0]
        size = sum(parameter.numel() for parameter in parameters)
        self.flat = torch.empty(size, dtype=first.dtype, device=first.device)
        self.num_parameters = self.num_missing = len(parameters)
        self.views: dict[Tensor, Tensor] = {}
        start = 0
        for parameter in parameters:
            part = self.flat.narrow(0, start, parameter.numel())
            self.views[parameter] = part.view(parameter.shape)
            start += parameter.numel()


class _Reducer:
    """Has the methods of torch's reducer that DDP calls in training."""

    def __init__(self, *arguments: Any) -> None:
        self._parameters: list[Tensor] = arguments[0]
        self._group, self._sparse = arguments[3], arguments[4]
        bucket_bytes, is_view, self._first_bytes = arguments[5], arguments[7], arguments[9]
        assert is_view, "strategies.py builds DDP with gradient_as_bucket_view"
        self._limits = [self._first_bytes, bucket_bytes]
        self._is_static = self._is_active = self._has_rebuilt = False
        self._num_steps = 0  # with reduction
        self._order: list[int] = []  # in which gradients were ready
        self._build(arguments[1])
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._ready)
            for parameter in self._parameters
        ]
        self._index = {parameter: index for index, parameter in enumerate(self._parameters)}

    def _build(self, indices: Sequence[Sequence[int]]) -> None:
        self._buckets = [_Bucket([self._parameters[i] for i in bucket]) for bucket in indices]
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.views}

    def set_logger(self, logger: Any) -> None:
        """DDP logs nothing here."""

    def prepare_for_forward(self) -> None:
        """Counts steps in torch's reducer."""

    def prepare_for_backward(self, outputs: Any) -> None:
        self._is_active = True
        self._num_steps += 1
        for bucket in self._buckets:
            bucket.num_missing = bucket.num_parameters

    def _set_static_graph(self) -> None:
        self._is_static = True

    def _rebuild_buckets(self) -> bool:
        """Forms buckets in the order of the gradients, once it is known."""
        wanted = 2 if self._is_static else 1  # torch 2.13: with a static graph a step later
        if self._has_rebuilt or self._num_steps < wanted:
            return False
        self._has_rebuilt = True
        ready = [self._parameters[index] for index in self._order]
        assign: Any = torch.distributed._compute_bucket_assignment_by_size  # type: ignore[attr-defined]
        indices, _ = assign(ready, self._limits, [False] * len(ready), self._order)
        self._build(indices)
        return True

    def _ready(self, parameter: Tensor) -> None:
        if not self._is_active:  # a micro-batch whose gradients only add up
            return
        bucket = self._bucket_of[parameter]
        view = bucket.views[parameter]
        assert parameter.grad is not None
        if parameter.grad is not view:
            view.copy_(parameter.grad)
            parameter.grad = view
        if len(self._order) < len(self._parameters):
            self._order.append(self._index[parameter])
        bucket.num_missing -= 1
        if bucket.num_missing == 0 and not (self._is_static and self._num_steps == 1):
            torch.distributed.all_reduce(bucket.flat, group=self._group)
        if not any(bucket.num_missing for bucket in self._buckets):
            self._is_active = False

    def _delay_all_reduce(self) -> None:
        """Reduces all gradients at the end of the first backward pass of a static graph."""
        for bucket in self._buckets:
            torch.distributed.all_reduce(bucket.flat, group=self._group)

    def _remove_autograd_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _check_reducer_finalized(self) -> None:
        """Called before a state dict is made."""


class _Logger:
    """Accepts what DDP logs."""

    def __init__(self, reducer: Any) -> None:
        pass

    def _get_ddp_logging_data(self) -> Any:
        return SimpleNamespace(strs_map={}, ints_map={})

    def __getattr__(self, name: str) -> Any:
        return _do_nothing


def _do_nothing(*arguments: Any, **options: Any) -> None:
    pass
