"""What watches a run from outside the timed steps: ceilings, memory, the compiler, the machine.

Every rank reads its own instruments; `Instruments.reading` is what goes into the record.
"""

import contextlib
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from unitransformer.config import RunConfig
from unitransformer.machine.calibration import Ceiling
from unitransformer.machine.ceilings import measure_ceiling
from unitransformer.machine.host import describe_host, peak_resident_bytes
from unitransformer.measure.compile_ledger import CompileLedger
from unitransformer.measure.host_load import HostSample, sample_host
from unitransformer.measure.nvml import Telemetry, gpu_identifiers
from unitransformer.parallel.activation_checkpointing import count_recomputed
from unitransformer.profiling.profiler import TraceCallback
from unitransformer.profiling.tensor_bytes import PeakTensorBytes

FIRST_SETTLED_STEP = (
    3  # steps of a launch until its buffers are what they stay: DDP's are made twice
)
LATEST = 12
LATE = 30  # steps of a launch after which most of what is slow at first is over
TRACED_STEPS = 3


class Instruments(pl.Callback):
    """Reads what one rank used. Right behind the clock's stop among the callbacks."""

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
        self._peaks: dict[str, int | None] = {}  # of training alone, where it came to its end
        self._recomputed: int | None = None  # layers, known when training has ended
        self._counted_step = find_quiet_step(config, first_step)
        self._counting: PeakTensorBytes | None = None
        self._counted: PeakTensorBytes | None = None
        self.trace: TraceCallback | None = None  # a callback beside this one
        if trace_folder is not None:
            # Two profilers cannot look at once.
            free = (
                first_step + FIRST_SETTLED_STEP
                if self._counted_step is None
                else self._counted_step + 2
            )
            half = first_step + min(LATE, (config.max_steps - first_step) // 2)
            self.trace = TraceCallback(
                trace_folder, first_step=max(free, half), num_steps=TRACED_STEPS
            )

    # ---- when something is looked at

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = pl_module.device
        self._measure_ceiling(device)
        reset_peaks(device)
        if device.type == "cuda":
            names = gpu_identifiers(torch.cuda.get_device_properties(device))
            self.telemetry = Telemetry(uuid=names["uuid"], pci_bus_id=names["pci_bus_id"])
        self.telemetry.start(self._step, holds_context=device.type == "cuda")
        self._host = [sample_host()]
        self.ledger.start()
        self.ledger.at_step(self._step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self._step:
            return  # a micro-batch
        self._step = trainer.global_step
        if pl_module.device.type == "cpu":
            self._count_tensors(trainer, pl_module)
        self.ledger.at_step(self._step)
        self.telemetry.at_step(self._step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ledger.at_step(None)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # what it has to do yet is of the steps
        self.telemetry.at_validation(self._step)

    def on_validation_end(self, *args: Any) -> None:
        self.telemetry.at_validation(self._step)
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
        """Whether something other than training happens after `step` steps of the run."""
        every, counted = self.config.checkpoint_every, self._counted_step
        if counted is not None and counted - 1 <= step <= counted + 1:
            return True
        if self.trace is not None and step in self.trace.pause_steps:
            return True
        return bool(every and step % every == 0)

    # ---- what was seen

    @property
    def unsteady(self) -> dict[int, str]:
        """Steps that were slowed down by measuring or compiled, and why."""
        reasons = dict.fromkeys(self.ledger.as_dict()["steps"], "compiled")
        if self.trace is not None:
            reasons |= dict.fromkeys(self.trace.traced_steps, "traced")
        if self._counted is not None and self._counted_step is not None:
            counted = (self._counted_step - 1, self._counted_step)
            reasons |= dict.fromkeys(counted, "bytes of tensors were counted")
        return reasons

    @property
    def matmul_flops_per_s(self) -> float | None:
        """The best rate of this rank's matrix products so far; None if not measured."""
        return None if self._ceiling is None else self._ceiling.matmul_flops_per_s

    def reading(self, device: torch.device) -> dict[str, Any]:
        """Of this rank, plain; what was not looked at is None."""
        counted, ceiling = self._counted, self._ceiling
        tensors = None if counted is None else {"bytes": counted.bytes, **counted.by_kind}
        peaks = self._peaks or read_peaks(device)
        if device.type == "cpu":
            peaks |= {"peak_bytes": None if counted is None else counted.bytes}
        return {
            "hardware": describe_host() | _describe_device(device) | self._clocks(),
            "host": self._host if len(self._host) == 2 else None,
            "gpu": self.telemetry.as_dict(self.first_step, self._step),
            "ceiling": None if ceiling is None else ceiling.as_dict(),
            "compile": self.ledger.as_dict(),
            "recomputed_layers": self._recomputed,
            "trace": None if self.trace is None else self.trace.as_dict(),
            "tensor_bytes": tensors,
            "unsteady": self.unsteady,
            "flags": [*self._flags, *self.telemetry.flags(self.first_step, self._step)],
            **peaks,
        }

    def _clocks(self) -> dict[str, float | None]:
        """Of the GPU, at the median look of this launch: idle ones at both ends do not count."""
        looks = self.telemetry.samples
        looks = looks[1:-1] or looks
        if not looks:
            return {}
        told: dict[str, float | None] = {}
        for name in ("sm_clock_hz", "memory_clock_hz"):
            clocks = [clock for look in looks if (clock := getattr(look, name)) is not None]
            told[name] = statistics.median_low(clocks) if clocks else None
        return told

    def _measure_ceiling(self, device: torch.device) -> None:
        """Before training and after it, half of the time each."""
        if self.config.ceiling_s == 0:
            return
        try:
            found = measure_ceiling(
                device, self.config.parallel.precision, budget_s=self.config.ceiling_s / 2
            )
        except RuntimeError as error:  # no reason to lose what was trained
            self._flags.append(f"a ceiling could not be measured: {str(error).splitlines()[0]}")
            return
        self._ceiling = found if self._ceiling is None else self._ceiling.join(found)

    def _count_tensors(self, trainer: pl.Trainer, module: Any) -> None:
        counted = self._counted_step
        if counted is None:
            return
        if self._step == counted - 1:
            self._counting = PeakTensorBytes(module=module, optimizers=trainer.optimizers)
            self._counting.__enter__()
        elif self._step == counted and self._counting is not None:
            self._counting.begin()
        elif self._step == counted + 1 and self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counted, self._counting = self._counting, None


def find_quiet_step(config: RunConfig, first_step: int) -> int | None:
    """A settled step, counted from 0 over all launches, that no validation or checkpoint touches,
    nor the one before it; None in a launch that has no such step early on."""

    def is_quiet(done: int) -> bool:
        saves = config.checkpoint_every and done % config.checkpoint_every == 0
        return done % config.validate_every != 0 and not saves

    first = first_step + FIRST_SETTLED_STEP
    for step in range(first, min(first_step + LATEST, config.max_steps)):
        if is_quiet(step - 1) and is_quiet(step):
            return step
    return None


def reset_peaks(device: torch.device) -> None:
    """Peaks are counted from here on: what was used to get ready and to calibrate is no matter."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # not Linux: the peak since the process began stands
        Path("/proc/self/clear_refs").write_text("5")


def read_peaks(device: torch.device) -> dict[str, int | None]:
    """Most bytes at once: allocated to tensors, reserved from CUDA, resident in the process."""
    on_gpu = device.type == "cuda"
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "peak_resident_bytes": peak_resident_bytes(),
    }


def _describe_device(device: torch.device) -> dict[str, Any]:
    precision = torch.get_float32_matmul_precision()
    if device.type != "cuda":
        threads = torch.get_num_threads()
        return {"device": "cpu", "threads": threads, "float32_matmul_precision": precision}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "device_memory_bytes": properties.total_memory,
        "float32_matmul_precision": precision,
    }
