"""Records the operators and memory blocks of one step under torch's profiler, with their location.

The profiler sees C++ as well: DDP's reducer, autograd's nodes, compiled code. A location is the
module whose forward pass was running, or whose forward pass created the node of the backward pass;
or `optimizer`, `zero_grad`, `gradients` (their accumulation), `step` (everything else).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

MODULE = "module "  # prefix of our ranges
BEGIN = "measured from here"
REST = "step"
_FSDP = "FSDP::"  # what FSDP2 does between modules: "FSDP::all_gather (network)"
_NODE = "autograd::engine::evaluate_function: "


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """An operator that was dispatched, or a block of memory that was allocated or freed."""

    name: str
    location: str
    inputs: tuple[Any, ...] = ()  # of an operator: torch's metadata of tensors, or numbers
    address: int = 0  # of a block
    num_bytes: int = 0  # of a block; negative: freed
    at_ns: int = 0  # for sorting only


class StepTrace:
    """Records between `start` and `stop`; `events` returns those of the thread that ran the step.

    From other threads it returns only the blocks that they free for this one: gloo's threads copy
    what they send through their own buffers, at arbitrary times.

    Args:
        module: its modules' names become locations; None: every location is `step`. Must be None
            for compiled modules, whose graphs the hooks would change.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        # Otherwise kineto prints a line when it starts and one when it stops.
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
        """Adds an event named `BEGIN`."""
        with record_function(BEGIN):
            pass

    def events(self) -> list[StepEvent]:
        """Returns the events in order of time."""
        results = self._profile.kineto_results
        assert results is not None
        roots_by_thread: dict[int, list[Any]] = {}
        for root in results.experimental_event_tree():
            roots_by_thread.setdefault(root.start_tid, []).append(root)
        events: list[StepEvent] = []
        of_others: list[StepEvent] = []
        for roots in roots_by_thread.values():
            read = list(_read(roots))
            if any(event.name == BEGIN for event in read):
                events += read
            else:
                of_others += _freed_for_others(read)
        return sorted([*events, *of_others], key=lambda event: event.at_ns)  # stable

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if id(module) in self._names:
            range_ = record_function(MODULE + self._names[id(module)])
            range_.__enter__()  # type: ignore[no-untyped-call]
            self._open.append((module, range_))

    def _exit_module(self, module: nn.Module, *_: Any) -> None:
        if self._open and self._open[-1][0] is module:
            self._open.pop()[1].__exit__(None, None, None)


def _freed_for_others(events: Iterable[StepEvent]) -> Iterator[StepEvent]:
    """Yields blocks that a thread frees and did not allocate."""
    allocated = set()
    for event in events:
        if event.num_bytes > 0:
            allocated.add(event.address)
        elif event.num_bytes < 0 and event.address in allocated:
            allocated.discard(event.address)
        elif event.num_bytes < 0:
            yield event


def module_names(module: nn.Module) -> dict[int, str]:
    """Returns each submodule's name by its identity, without FSDP1's additions to the name."""
    names = {}
    for name, submodule in module.named_modules():
        plain = ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")
        if plain:
            names[id(submodule)] = plain.removeprefix("objective.")
    return names


def _read(roots: Iterable[Any]) -> Iterator[StepEvent]:
    """Yields events depth first, which is the order of time."""
    forward: dict[int, str] = {}  # an autograd node's number -> where it was created
    # Not recursive: the tree of a deep network exceeds the recursion limit.
    stack = [(root, REST) for root in reversed(list(roots))]
    while stack:
        node, outer = stack.pop()
        fields = node.extra_fields
        number = getattr(fields, "sequence_number", -1)
        location = _locate(node.name, number, outer, forward)
        if hasattr(fields, "alloc_size"):
            if fields.device.type == "cpu":
                yield StepEvent(
                    name="memory",
                    location=location,
                    address=fields.ptr,
                    num_bytes=fields.alloc_size,
                    at_ns=node.start_time_ns,
                )
        elif node.name == BEGIN or "::" in node.name:
            if number >= 0 and not node.name.startswith(_NODE):
                forward.setdefault(number, location)
            inputs = tuple(getattr(fields, "inputs", None) or ())
            yield StepEvent(
                name=node.name, location=location, inputs=inputs, at_ns=node.start_time_ns
            )
        stack += [(child, location) for child in reversed(node.children)]


def _locate(name: str, number: int, outer: str, forward: dict[int, str]) -> str:
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
