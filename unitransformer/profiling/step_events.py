"""Records the operators and memory blocks of one step under torch's profiler.

The profiler sees C++ as well: DDP's reducer, autograd's nodes, compiled code.
"""

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import record_function

BEGIN = "measured from here"
REST = "step"  # the location of everything that no subclass locates


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
    """

    def __init__(self) -> None:
        # Otherwise kineto prints a line when it starts and one when it stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._profile = torch.autograd.profiler.profile(record_shapes=True, profile_memory=True)

    def start(self) -> None:
        self._profile.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self._profile.__exit__(None, None, None)  # type: ignore[no-untyped-call]

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
            read = list(self._read(roots))
            if any(event.name == BEGIN for event in read):
                events += read
            else:
                of_others += _freed_for_others(read)
        return sorted([*events, *of_others], key=lambda event: event.at_ns)  # stable

    def locate(self, node: Any, outer: str) -> str:
        """Returns the location of a node of the profiler's tree, given that of the node around."""
        return outer

    def _read(self, roots: Iterable[Any]) -> Iterator[StepEvent]:
        """Yields events depth first, which is the order of time."""
        # Not recursive: the tree of a deep network exceeds the recursion limit.
        stack = [(root, REST) for root in reversed(list(roots))]
        while stack:
            node, outer = stack.pop()
            fields, location = node.extra_fields, self.locate(node, outer)
            event = functools.partial(StepEvent, location=location, at_ns=node.start_time_ns)
            if hasattr(fields, "alloc_size"):
                if fields.device.type == "cpu":
                    yield event(name="memory", address=fields.ptr, num_bytes=fields.alloc_size)
            elif node.name == BEGIN or "::" in node.name:
                inputs = tuple(getattr(fields, "inputs", None) or ())
                yield event(name=node.name, inputs=inputs)
            stack += [(child, location) for child in reversed(node.children)]


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
