"""Reads what a run uses besides time: hardware ceilings, memory, compilations, host and GPU load.

Every rank reads its own instruments, outside of the timed steps. `Instruments.reading` goes into
the record.
"""

import contextlib
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from unitransformer.config import RunConfig
from unitransformer.machine.calibration import Ceiling
from unitransformer.machine.ceilings import dtype_of, measure_ceiling
from unitransformer.machine.host import describe_host, peak_resident_bytes
from unitransformer.machine.network import describe_network
from unitransformer.measure.compile_ledger import CompileLedger
from unitransformer.measure.host_load import HostSample, sample_host
from unitransformer.measure.nvml import Telemetry
from unitransformer.parallel.activation_checkpointing import count_recomputed
from unitransformer.parallel.strategies import count_unbucketed_steps
from unitransformer.profiling.profiler import TraceCallback
from unitransformer.profiling.tensor_bytes import PeakTensorBytes

# Steps after the start of a launch.
FIRST_SETTLED_STEP = 3  # DDP allocates its buffers twice before
QUIET_STEP_LIMIT = 12  # tensor bytes are counted before this step, or not at all
MAX_TRACE_START = 30  # most of what makes early steps slow is over
TRACED_STEPS = 3


class Instruments(pl.Callback):
    """Reads what one rank uses; `trace`, if any, is another callback of the run."""

    def __init__(
        self, config: RunConfig, *, first_step: int, trace_folder: Path | None = None
    ) -> None:
        self.config = config
        self.ledger = CompileLedger(config.parallel.compile)
        self.telemetry = Telemetry(uuid=None)
        self._host: list[HostSample] = []  # at the start and at the end
        self.first_step = self._step = first_step
        self._ceiling: Ceiling | None = None
        self._flags: list[str] = []
        self._peaks: dict[str, int | None] = {}  # of training alone; empty if it did not end
        self._loss_blocks: dict[str, Any] | None = None  # known when training starts
        self._recomputed: int | None = None  # layers, known when training has ended
        self._counted_step = find_quiet_step(config, first_step)
        self._counting: PeakTensorBytes | None = None
        self._counted: PeakTensorBytes | None = None
        self.trace: TraceCallback | None = None
        if trace_folder is not None:
            # torch runs one profiler at a time: trace after tensor bytes are counted.
            free = first_step + FIRST_SETTLED_STEP
            if self._counted_step is not None:
                free = self._counted_step + 2
            half = first_step + min(MAX_TRACE_START, (config.max_steps - first_step) // 2)
            self.trace = TraceCallback(
                trace_folder, first_step=max(free, half), num_steps=TRACED_STEPS
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = pl_module.device
        blocks = getattr(pl_module, "loss_blocks", None)
        self._loss_blocks = None if blocks is None else asdict(blocks)
        self._measure_ceiling(device)
        reset_peaks(device)
        if device.type == "cuda":
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            # AMD's GPUs have an identifier too, which NVML does not know.
            self.telemetry = Telemetry(uuid=None if torch.version.hip else uuid)
        self.telemetry.start(self._step, holds_context=device.type == "cuda")
        self._host = [sample_host()]
        self.ledger.start()
        self.ledger.at_step(self._step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self._step:
            return  # a micro-batch
        self._step = trainer.global_step
        if pl_module.device.type == "cpu" and self._counted_step is not None:
            self._count_tensors(self._step - self._counted_step, trainer, pl_module)
        self.ledger.at_step(self._step)
        self.telemetry.at_step(self._step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ledger.at_step(None)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # the energy of queued steps is theirs
        self.telemetry.take_sample(self._step)

    def on_validation_end(self, *args: Any) -> None:
        self.telemetry.take_sample(self._step)
        self.ledger.at_step(self._step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._peaks = read_peaks(pl_module.device)
        self._recomputed = count_recomputed(
            pl_module.objective, is_compiled=self.config.parallel.compile != "off"
        )
        self._stop()
        self._measure_ceiling(pl_module.device)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if not self._host:
            return  # training had not begun
        if self._counting is not None:
            self._counting.__exit__(type(exception), exception, exception.__traceback__)
            self._counting = None
        self._stop()

    def _stop(self) -> None:
        self.ledger.stop()
        self.telemetry.stop(self._step)
        self._host.append(sample_host())

    def needs_barrier(self, step: int) -> bool:
        """Returns whether something other than training happens after `step` steps of the run."""
        every, counted = self.config.checkpoint_every, self._counted_step
        if counted is not None and counted - 1 <= step <= counted + 1:
            return True
        if self.trace is not None and step in self.trace.pause_steps:
            return True
        return bool(every and step % every == 0)

    @property
    def excluded_steps(self) -> dict[int, str]:
        """Steps that are unlike the later ones, with the reason."""
        unbucketed = range(self.first_step, self.first_step + count_unbucketed_steps(self.config))
        reasons = dict.fromkeys(unbucketed, "gradients reduced in one bucket")
        reasons |= dict.fromkeys(self.ledger.as_dict()["steps"], "compiled")
        if self.trace is not None:
            reasons |= dict.fromkeys(self.trace.traced_steps, "traced")
        if self._counted is not None and self._counted_step is not None:
            counted = (self._counted_step - 1, self._counted_step)
            reasons |= dict.fromkeys(counted, "tensor bytes counted")
        return reasons

    @property
    def matmul_flops_per_s(self) -> float | None:
        """The best rate of this rank's matrix products so far; None if not measured."""
        return None if self._ceiling is None else self._ceiling.matmul_flops_per_s

    def reading(self, device: torch.device) -> dict[str, Any]:
        """Returns all readings of this rank as plain data; None for what was not read."""
        counted, ceiling = self._counted, self._ceiling
        tensors = None if counted is None else {"bytes": counted.bytes, **counted.by_kind}
        peaks = self._peaks or read_peaks(device)
        if device.type == "cpu":
            peaks |= {"peak_bytes": None if counted is None else counted.bytes}
        return {
            "hardware": describe_host() | _describe_device(device) | self._median_clocks(),
            "network": describe_network(device.type),
            "host": self._host if len(self._host) == 2 else None,
            "gpu": self.telemetry.as_dict(self.first_step, self._step),
            "ceiling": None if ceiling is None else ceiling.as_dict(),
            "compile": self.ledger.as_dict(),
            "recomputed_layers": self._recomputed,
            "loss_blocks": self._loss_blocks,
            "trace": None if self.trace is None else self.trace.as_dict(),
            "tensor_bytes": tensors,
            "excluded_steps": self.excluded_steps,
            "flags": [*self._flags, *self.telemetry.flags(self.first_step, self._step)],
            **peaks,
        }

    def _median_clocks(self) -> dict[str, float | None]:
        """Returns median clocks of the GPU, without the first and last sample, which are idle."""
        samples = self.telemetry.samples
        samples = samples[1:-1] or samples
        if not samples:
            return {}
        medians: dict[str, float | None] = {}
        for name in ("sm_clock_hz", "memory_clock_hz"):
            clocks = [hz for sample in samples if (hz := getattr(sample, name)) is not None]
            medians[name] = statistics.median_low(clocks) if clocks else None
        return medians

    def _measure_ceiling(self, device: torch.device) -> None:
        """Measures for half of the budget; called before and after training."""
        if self.config.ceiling_s == 0:
            return
        try:
            dtype = dtype_of(self.config.parallel.precision, device)
            ceiling = measure_ceiling(device, dtype, budget_s=self.config.ceiling_s / 2)
        except RuntimeError as error:  # training is worth more than its ceiling
            self._flags.append(f"a ceiling could not be measured: {str(error).splitlines()[0]}")
            return
        self._ceiling = ceiling if self._ceiling is None else self._ceiling.merge(ceiling)

    def _count_tensors(self, steps_late: int, trainer: pl.Trainer, module: Any) -> None:
        """Counts tensor bytes of a step; `steps_late` is 0 when that step begins."""
        if steps_late == -1:
            self._counting = PeakTensorBytes(module=module, optimizers=trainer.optimizers)
            self._counting.__enter__()
        elif steps_late == 0 and self._counting is not None:
            self._counting.begin()
        elif steps_late == 1 and self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counted, self._counting = self._counting, None


def find_quiet_step(config: RunConfig, first_step: int) -> int | None:
    """Returns an early settled step with no validation or checkpoint near it; None without one.

    Validation and checkpoints touch neither that step nor the one before. Steps count from 0 over
    all launches.
    """

    def is_quiet(step: int) -> bool:
        saves = config.checkpoint_every and step % config.checkpoint_every == 0
        return step % config.validate_every != 0 and not saves

    first = first_step + FIRST_SETTLED_STEP
    for step in range(first, min(first_step + QUIET_STEP_LIMIT, config.max_steps)):
        if is_quiet(step - 1) and is_quiet(step):
            return step
    return None


def reset_peaks(device: torch.device) -> None:
    """Forgets the memory peaks of set-up and calibration."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # not Linux: the peak since the process began remains
        Path("/proc/self/clear_refs").write_text("5")


def read_peaks(device: torch.device) -> dict[str, int | None]:
    """Returns peak bytes: allocated to tensors, reserved from CUDA, resident in the process."""
    on_gpu = device.type == "cuda"
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "peak_resident_bytes": peak_resident_bytes(),
    }


def _describe_device(device: torch.device) -> dict[str, Any]:
    precision = {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    if device.type != "cuda":
        return {"device": "cpu", "threads": torch.get_num_threads(), **precision}
    gpu = torch.cuda.get_device_properties(device)
    return {"device": gpu.name, "device_memory_bytes": gpu.total_memory, **precision}
