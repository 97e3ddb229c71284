"""Communication that nothing hides, of every step: where a rank stands and waits, on the clock.

On a CPU that is time in which Python waits for a collective. On a GPU the host does not wait, its
stream does: two events around the place where it begins to. DDP reduces gradients out of Python's
sight; what is left of that when the last gradient is there, is waited for.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from unitransformer.config import ParallelConfig
from unitransformer.measure.clock import StepClock
from unitransformer.profiling.collective_waits import Wait, wrapped_waits

# FSDP1 and DeepSpeed wait for streams of their own in ways that no GPU has been seen doing.
UNTOLD = "on a GPU {strategy} waits on streams of its own; --trace tells communication apart"


def why_untold(parallel: ParallelConfig, device: str) -> str | None:
    """Why exposed communication is not told of every step; None if it is.

    Args:
        device: "cpu" or "cuda", already found.
    """
    if device == "cuda" and (parallel.uses_deepspeed or parallel.strategy == "fsdp1"):
        return UNTOLD.format(strategy=parallel.strategy)
    return None


@contextlib.contextmanager
def clocked_waits(clock: StepClock, parallel: ParallelConfig, device: str) -> Iterator[None]:
    """Within, `clock` is told whenever this rank waits for others."""
    if parallel.world_size == 1 or why_untold(parallel, device) is not None:
        yield
        return
    trains = threading.get_ident()

    def holds_up(*arguments: Any) -> bool:
        # A checkpoint is written by a thread that waits beside the training. Autograd has threads
        # of its own for GPUs.
        if threading.get_ident() != trains and torch._C._current_graph_task_id() == -1:
            return False
        return device == "cpu" or _computes_here(*arguments)

    clocked = functools.partial(_clocked, clock, holds_up)
    with contextlib.ExitStack() as held:
        held.enter_context(wrapped_waits(clocked))
        # Its buffers come from the first rank, every time.
        held.enter_context(_replaced(DistributedDataParallel, "_sync_buffers", clocked))
        if device == "cuda":
            # FSDP2 communicates on streams that the one that computes waits for.
            held.enter_context(_replaced(torch.cuda.Stream, "wait_event", clocked))
        yield


def _computes_here(*arguments: Any) -> bool:
    """Whether it is the stream that computes which will stand still."""
    stream = torch.cuda.current_stream()
    own = [argument for argument in arguments if isinstance(argument, torch.cuda.Stream)]
    return all(each == stream for each in (torch.cuda.default_stream(), *own))


def _clocked(clock: StepClock, holds_up: Callable[..., bool], wait: Wait) -> Wait:
    def wait_on_the_clock(*arguments: Any, **options: Any) -> Any:
        if not holds_up(*arguments):
            return wait(*arguments, **options)
        clock.begin_wait()
        try:
            return wait(*arguments, **options)
        finally:
            clock.end_wait()

    return wait_on_the_clock


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Any) -> Iterator[None]:
    method = getattr(owner, name)
    setattr(owner, name, wrap(method))
    try:
        yield
    finally:
        setattr(owner, name, method)


class ClocksReduction(pl.Callback):
    """DDP's reducing of gradients, from the last gradient on. First of the callbacks, or behind
    those that do nothing around a backward pass."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self._is_reducing = False

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        model = trainer.strategy.model
        # Only the last micro-batch of a step is reduced.
        if isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
            loss.register_hook(self._queue)  # type: ignore[no-untyped-call]

    def on_after_backward(self, *args: Any) -> None:
        if self._is_reducing:
            self._is_reducing = False
            self.clock.end_wait()

    def _queue(self, _: Tensor) -> None:
        # Called in their order when the pass is done: this one comes before DDP's, which waits.
        Variable._execution_engine.queue_callback(self._begin)

    def _begin(self) -> None:
        self._is_reducing = True
        self.clock.begin_wait()
