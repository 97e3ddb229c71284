"""Trains a recipe a few steps at a time: `python -P paired_worker.py gpt --devices 1 ...`.

Run by its path, with the code of any revision on PYTHONPATH: it asks nothing of this project but
to train, so that revisions without this file can be compared too. It leaves importing torch and
Lightning to the recipe, which may import less of them. Each line of standard input asks, and a line
of standard output answers:

{"about": true, "start": 0} -> {"versions": {...}, "device": "...", "clock": "gpu" or "processor"};
sides that get the same number of a start stay on the same processor if they have one thread
{"steps": 3} -> {"processor_s": ..., "wall_s": ..., "gpu_s": ... or null, "losses": [...],
"peak_bytes": ...}: optimizer steps, whole, between two of which validation does not run.
"""

import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl

PACKAGES = ("torch", "lightning", "numpy")
TRAINER = "lightning.pytorch.trainer.trainer"


class StepsOnRequest:
    """The hooks of a callback that waits for a request, runs its steps and answers their times."""

    def __init__(self, answers: Any, requests: Any) -> None:
        self.answers, self.requests = answers, requests
        self._left = 0
        self._last_step = 0
        self._losses: list[Any] = []
        self._start: tuple[float, float, Any] = (0.0, 0.0, None)

    def on_train_start(self, trainer: "pl.Trainer", *arguments: Any) -> None:
        if trainer.world_size != 1:
            raise ValueError(
                "a comparison trains on one device; leave --devices and --strategy out"
            )
        self._last_step = trainer.global_step
        _reset_peak(trainer)  # the recipe may have measured this machine before
        self._wait(trainer)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", module: Any, outputs: Any, *arguments: Any
    ) -> None:
        import torch

        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor):
            self._losses.append(loss.detach().clone())  # CUDA graphs reuse its memory
        if trainer.global_step == self._last_step:
            return  # a micro-batch
        self._last_step = trainer.global_step
        self._left -= 1
        if self._left == 0:
            self._answer(self._measured(trainer))
            self._wait(trainer)

    def _wait(self, trainer: "pl.Trainer") -> None:
        while line := self.requests.readline():
            request = json.loads(line)
            if "steps" in request:
                self._left, self._losses = request["steps"], []
                self._start = _now(trainer)
                return
            _share_processor(trainer, request.get("start"))
            self._answer(_describe(trainer))
        os._exit(0)  # the comparison has ended

    def _measured(self, trainer: "pl.Trainer") -> dict[str, Any]:
        end = _now(trainer)
        gpu_s = None
        if end[2] is not None:
            gpu_s = self._start[2].elapsed_time(end[2]) / 1000
        return {
            "processor_s": end[0] - self._start[0],
            "wall_s": end[1] - self._start[1],
            "gpu_s": gpu_s,
            "losses": [float(loss) for loss in self._losses],
            "peak_bytes": _peak_bytes(trainer),
        }

    def _answer(self, answer: dict[str, Any]) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()


def _now(trainer: "pl.Trainer") -> tuple[float, float, Any]:
    """Returns processor time, wall time and, on a GPU, an event that has happened."""
    event = None
    if trainer.strategy.root_device.type == "cuda":
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        event.synchronize()
    return time.process_time(), time.perf_counter(), event


def _describe(trainer: "pl.Trainer") -> dict[str, Any]:
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    import torch

    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **versions, "torch build": _build()},
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "clock": "gpu" if on_gpu else "processor",
    }


def _build() -> str:
    """Returns for which devices torch was built."""
    from torch import version

    for name, of in (("CUDA", "cuda"), ("ROCm", "hip"), ("XPU", "xpu")):
        if number := getattr(version, of, None):
            return f"{name} {number}"
    return "CPU"


def _share_processor(trainer: "pl.Trainer", start: int | None) -> None:
    """Keeps one thread on the processor that the other side's thread uses too.

    The system would leave each on a processor of its own, and what runs beside them, on the other
    thread of a core for example, would slow one of them more.
    """
    import torch

    is_alone = trainer.strategy.root_device.type == "cpu" and torch.get_num_threads() == 1
    if start is not None and is_alone and hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[start % len(processors)]})


def _reset_peak(trainer: "pl.Trainer") -> None:
    if trainer.strategy.root_device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)  # what measured the machine keeps over a gibibyte
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM: man 5 proc


def _peak_bytes(trainer: "pl.Trainer") -> int:
    """Returns the peak of the tensors on a GPU, or else of the process."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class TrainerFinder(importlib.abc.MetaPathFinder):
    """Gives every trainer the callback, as soon as the recipe imports Lightning."""

    def __init__(self, answers: Any, requests: Any) -> None:
        self.answers, self.requests = answers, requests

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                self._add_callback_to(module.Trainer)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec

    def _add_callback_to(self, trainer: Any) -> None:
        initialize = trainer.__init__

        def initialize_with_callback(trainer: Any, *arguments: Any, **options: Any) -> None:
            from lightning.pytorch import Callback

            steps = type("StepsOnRequest", (StepsOnRequest, Callback), {})
            callbacks = [*(options.pop("callbacks", None) or [])]
            callbacks.append(steps(self.answers, self.requests))
            initialize(trainer, *arguments, callbacks=callbacks, **options)

        trainer.__init__ = initialize_with_callback


def main() -> int:
    """Trains until nobody asks any more; returns the exit code of a recipe that ended before."""
    # Standard output carries answers alone: what the recipe prints goes to standard error.
    answers, requests = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.meta_path.insert(0, TrainerFinder(answers, requests))
    recipe, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    runpy.run_module(f"recipes.{recipe}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    main()
    sys.exit("error: the recipe ended before its steps were measured; give more --max-steps")
