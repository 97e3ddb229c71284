"""Times the exposed communication of every step: the time in which a rank waits for other ranks.

On a CPU that is the time in which Python waits for a collective. On a GPU the stream waits and the
host does not: CUDA events are recorded around each wait of the compute stream. DDP reduces
gradients in C++; the part of that which is left after the last gradient counts as a wait.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from unitransformer.config import ParallelConfig
from unitransformer.measure.clock import StepClock
from unitransformer.profiling.collective_waits import Wait, replace_method, wrap_waits


def why_communication_missing(parallel: ParallelConfig, device: str) -> str | None:
    """Returns why exposed communication is not measured in every step on "cpu" or "cuda", if so."""
    # How FSDP1 and DeepSpeed wait for their streams was never checked on a GPU.
    if device == "cuda" and (parallel.uses_deepspeed or parallel.strategy == "fsdp1"):
        return f"{parallel.strategy} waits on its own GPU streams; use --trace instead"
    return None


@contextlib.contextmanager
def timed_waits(clock: StepClock, parallel: ParallelConfig, device: str) -> Iterator[None]:
    """Reports every wait for other ranks to `clock` inside the block."""
    if parallel.world_size == 1 or why_communication_missing(parallel, device) is not None:
        yield
        return
    training_thread = threading.get_ident()

    def delays_step(*arguments: Any) -> bool:
        # The thread that writes checkpoints waits too, without delaying the step. Autograd runs
        # the backward pass of a GPU in its own threads.
        if threading.get_ident() != training_thread and torch._C._current_graph_task_id() == -1:
            return False
        if device == "cpu":
            return True
        # The default stream must wait: as the stream of `wait_event`, or as the current one.
        waiting = [argument for argument in arguments if isinstance(argument, torch.cuda.Stream)]
        current = torch.cuda.current_stream()
        return all(stream == current for stream in (torch.cuda.default_stream(), *waiting))

    def timed(wait: Wait) -> Wait:
        def timed_wait(*arguments: Any, **options: Any) -> Any:
            if not delays_step(*arguments):
                return wait(*arguments, **options)
            clock.begin_wait()
            try:
                return wait(*arguments, **options)
            finally:
                clock.end_wait()

        return timed_wait

    with contextlib.ExitStack() as stack:
        stack.enter_context(wrap_waits(timed))
        if device == "cuda":
            # FSDP2 communicates on other streams, for which the compute stream waits.
            stack.enter_context(replace_method(torch.cuda.Stream, "wait_event", timed))
        yield


class TimeGradientReduction(pl.Callback):
    """Times DDP's gradient reduction from the last gradient on.

    Must precede callbacks that work around a backward pass.
    """

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
        # Autograd calls these in order after the backward pass: this one precedes DDP's, which
        # waits.
        Variable._execution_engine.queue_callback(self._begin)

    def _begin(self) -> None:
        self._is_reducing = True
        self.clock.begin_wait()
