"""One step under torch's profiler in; what it dispatched and allocated, in order and by place, out.

The profiler sees what C++ does as well: DDP's reducer, autograd's nodes, compiled code. A place is
the module whose forward pass was running, or whose forward pass made the node of the backward
pass; or `optimizer`, `zero_grad`, `gradients` (they are added up), `step` (all the rest).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

MODULE = "module "  # what our own ranges begin with
BEGIN = "measured from here"
REST = "step"
_FSDP = "FSDP::"  # what FSDP2 does between modules, and for which: "FSDP::all_gather (network)"
_NODE = "autograd::engine::evaluate_function: "


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """An operator that was dispatched, or a block of memory that was taken or given back."""

    name: str
    location: str
    inputs: tuple[Any, ...] = ()  # of an operator: torch's metadata of tensors, or numbers
    address: int = 0  # of a block
    num_bytes: int = 0  # of a block; negative: given back
    at_ns: int = 0  # only for the order


class StepTrace:
    """Records between `start` and `stop`; `events` are those of the thread that ran the step.

    Of other threads only the blocks that they give back for this one are kept: gloo's copy what
    they send through buffers of their own, when they get to it.

    Args:
        module: its modules' names become places. None: everything is in `step`. Not for compiled
            modules, whose graphs the hooks that note the names would change.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        # Or kineto prints a line when it starts and one when it stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._profile = torch.autograd.profiler.profile(record_shapes=True, profile_memory=True)
        self._names = {} if module is None else module_names(module)
        self._open: list[tuple[nn.Module, record_function]] = []
        self._hooks = contextlib.ExitStack()

    def start(self) -> None:
        if self._names:
            before = register_module_forward_pre_hook(self._enter_module)
            after = register_module_forward_hook(self._exit_module, always_call=True)
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)
        self._profile.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self._profile.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def mark(self) -> None:
        """A place in the order of events, named `BEGIN`."""
        with record_function(BEGIN):
            pass

    def events(self) -> list[StepEvent]:
        """In order."""
        results = self._profile.kineto_results
        assert results is not None
        roots = results.experimental_event_tree()
        thread = next(_find(roots, BEGIN)).start_tid
        own = list(_read([root for root in roots if root.start_tid == thread]))
        others = {root.start_tid for root in roots} - {thread}
        given_back = [
            event
            for other in others
            for event in _given_back(_read([root for root in roots if root.start_tid == other]))
        ]
        return sorted(own + given_back, key=lambda event: event.at_ns)  # stable

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if id(module) in self._names:
            range_ = record_function(MODULE + self._names[id(module)])
            range_.__enter__()  # type: ignore[no-untyped-call]
            self._open.append((module, range_))

    def _exit_module(self, module: nn.Module, *_: Any) -> None:
        if self._open and self._open[-1][0] is module:
            self._open.pop()[1].__exit__(None, None, None)


def _given_back(events: Iterable[StepEvent]) -> Iterator[StepEvent]:
    """Blocks that a thread gives back and did not take."""
    taken = set()
    for event in events:
        if event.num_bytes > 0:
            taken.add(event.address)
        elif event.num_bytes < 0 and event.address in taken:
            taken.discard(event.address)
        elif event.num_bytes < 0:
            yield event


def module_names(module: nn.Module) -> dict[int, str]:
    """Each module's name, by its identity, without what FSDP1 adds to it."""
    names = {}
    for name, part in module.named_modules():
        words = [word for word in name.split(".") if word != "_fsdp_wrapped_module"]
        plain = ".".join(words)
        if plain:
            names[id(part)] = plain.removeprefix("objective.")
    return names


def _find(events: Iterable[Any], name: str) -> Iterator[Any]:
    for event in events:
        if event.name == name:
            yield event
        yield from _find(event.children, name)


def _read(roots: Iterable[Any]) -> Iterator[StepEvent]:
    """Depth first, which is the order of time."""
    forward: dict[int, str] = {}  # an autograd node's number -> where it was made
    # No recursion: a deep network's tree is deep too.
    left = [(root, REST) for root in reversed(list(roots))]
    while left:
        node, outer = left.pop()
        number = getattr(node.extra_fields, "sequence_number", -1)
        place = _place(node.name, number, outer, forward)
        if hasattr(node.extra_fields, "alloc_size"):
            fields = node.extra_fields
            if fields.device.type == "cpu":
                yield StepEvent(
                    name="memory",
                    location=place,
                    address=fields.ptr,
                    num_bytes=fields.alloc_size,
                    at_ns=node.start_time_ns,
                )
        elif node.name == BEGIN or "::" in node.name:
            if number >= 0 and not node.name.startswith(_NODE):
                forward.setdefault(number, place)
            inputs = tuple(getattr(node.extra_fields, "inputs", None) or ())
            yield StepEvent(name=node.name, location=place, inputs=inputs, at_ns=node.start_time_ns)
        left += [(child, place) for child in reversed(node.children)]


def _place(name: str, number: int, outer: str, forward: dict[int, str]) -> str:
    if name.startswith(MODULE):
        return name.removeprefix(MODULE)
    if name.startswith(_NODE):
        return "gradients" if "AccumulateGrad" in name else forward.get(number, outer)
    if name.startswith(_FSDP):
        return name.partition("(")[2].rstrip(")").removeprefix("objective.") or "objective"
    if name.startswith("Optimizer.zero_grad"):
        return "zero_grad"
    if name.startswith("Optimizer.step"):
        return "optimizer"
    return outer
