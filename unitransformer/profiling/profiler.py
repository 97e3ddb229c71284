"""Traces a few steps with torch's profiler (`--trace DIR`) and reports how they spend their time.

A traced step is slower than others, so no measurement includes it.
"""

import contextlib
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from unitransformer.files import write_atomically
from unitransformer.profiling.trace_breakdown import (
    BACKWARD,
    HEAD,
    NETWORK,
    STEP,
    WINDOW,
    time_shares,
    window_seconds,
)


class TraceCallback(pl.Callback):
    """Traces steps [first_step, first_step + num_steps) of the first rank.

    Args:
        folder: gets `trace-rank0.json.gz`, which Perfetto opens, and `shares-rank0.json`.
        first_step: counted from 0 over all launches; late enough to be steady.
        num_steps: at least 1, and few, since the trace of every operator is long.
    """

    def __init__(self, folder: Path, *, first_step: int, num_steps: int = 3) -> None:
        if first_step < 0:
            raise ValueError(f"first_step is {first_step}; steps count from 0")
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; trace at least 1")
        self.folder = folder
        self.first_step, self.num_steps = first_step, num_steps
        self.pause_steps = first_step, first_step + num_steps  # tracing begins and ends after them
        self.traced_steps: list[int] = []
        self._profile: Any = None
        self._ranges: list[Any] = []  # open ones, outermost first
        self._undo = contextlib.ExitStack()
        self._result: dict[str, Any] = {"rows": None, "reason": f"step {first_step} not reached"}

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data; `rows` is None, with the `reason`, without a complete trace.

        - `rows`: part, share of the traced steps (they add up to 1), seconds per step
        - `steps`: the traced ones, even without rows, since no measurement includes them
        - `head_by`: how head and loss were recognized: "ranges", "shape", or None if they could
          not be, and count as matrix multiply and other
        """
        return {**self._result, "steps": list(self.traced_steps)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._advance(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self._advance(trainer, pl_module)

    def on_before_backward(self, *args: Any) -> None:
        if self._profile is not None:
            self._open_range(BACKWARD)

    def on_after_backward(self, *args: Any) -> None:
        if self._profile is not None:
            self._close_range()

    def on_validation_start(self, *args: Any) -> None:
        if self._profile is not None:
            self._close_window()

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._profile is not None:
            self._open_window(trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._profile is not None:
            self._stop("training ended before the last step to be traced")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._profile is not None:
            self._stop(f"training failed: {type(exception).__name__}")

    def _advance(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts, continues or ends tracing where a step may have ended."""
        step = trainer.global_step
        if self._profile is None:
            if step == self.first_step and trainer.global_rank == 0:
                self._start(pl_module)
                self._open_window(step)
        elif step >= self.pause_steps[1]:
            self._stop(None)
            self._write(pl_module)
        elif step > self.traced_steps[-1]:
            self._close_range()
            self._begin_step(step)

    def _start(self, module: Any) -> None:
        self._on_gpu = module.device.type == "cuda"
        parallel = module.config.parallel
        self._is_one_graph = parallel.compile != "off" and not parallel.is_sharded
        self._add_ranges(module)
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _stop(self, reason: str | None) -> None:
        self._close_window()
        self._profile.stop()
        self._undo.close()
        self._result["reason"] = reason
        if reason is not None:
            self._profile = None

    def _open_window(self, step: int) -> None:
        self._synchronize()
        self._open_range(WINDOW)
        self._begin_step(step)

    def _close_window(self) -> None:
        self._synchronize()
        while self._ranges:
            self._close_range()

    def _begin_step(self, step: int) -> None:
        self._open_range(f"{STEP}{step}")
        if step not in self.traced_steps:
            self.traced_steps.append(step)

    def _synchronize(self) -> None:
        if self._on_gpu:
            with contextlib.suppress(RuntimeError):  # a broken device is reported elsewhere
                torch.cuda.synchronize()

    def _open_range(self, name: str) -> None:
        opened = record_function(name)
        opened.__enter__()  # type: ignore[no-untyped-call]
        self._ranges.append(opened)

    def _close_range(self) -> None:
        self._ranges.pop().__exit__(None, None, None)

    def _add_ranges(self, module: Any) -> None:
        """Puts ranges around the network, and around head and loss, by replacing methods."""
        training_step = module.training_step

        def step_in_range(*arguments: Any, **named: Any) -> Any:
            self._open_range(NETWORK)
            depth = len(self._ranges)
            loss = training_step(*arguments, **named)
            while len(self._ranges) >= depth:
                self._close_range()
            return loss

        module.training_step = step_in_range
        self._undo.callback(delattr, module, "training_step")
        if self._is_one_graph:  # a change inside the graph would recompile it
            return
        network = module.objective.network
        states = network.states

        def states_then_head(*arguments: Any, **named: Any) -> Any:
            output = states(*arguments, **named)
            if self._ranges:  # validation has none
                self._open_range(HEAD)
            return output

        network.states = states_then_head
        self._undo.callback(delattr, network, "states")

    def _write(self, module: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "trace.json.gz"
            self._profile.export_chrome_trace(str(exported))
            content = exported.read_bytes()
        self._profile = None
        write_atomically(self.folder / "trace-rank0.json.gz", content)
        trace, model = json.loads(gzip.decompress(content)), module.config.model
        other_sides = (model.width, 3 * model.width, model.feedforward_width, model.num_positions)
        head_by: str | None = "ranges"
        if self._is_one_graph:
            head_by = None if model.num_classes in other_sides else "shape"
        num_classes = model.num_classes if head_by == "shape" else None
        step_s = window_seconds(trace) / self.num_steps
        rows = None
        try:
            shares = time_shares(trace, on_gpu=self._on_gpu, num_classes=num_classes)
        except ValueError as error:  # training is worth more than its trace
            self._result["reason"] = str(error)
        else:
            rows = [
                {"part": part, "share": share, "s_per_step": share * step_s}
                for part, share in shares.items()
            ]
        self._result |= {"rows": rows, "head_by": head_by, "step_s": step_s}
        table = json.dumps(self.as_dict(), indent=1).encode()
        write_atomically(self.folder / "shares-rank0.json", table)
