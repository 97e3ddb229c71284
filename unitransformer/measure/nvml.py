"""Reads clocks, power, temperature, energy and processes of an NVIDIA GPU during a run, from NVML.

Uses `pynvml` (package nvidia-ml-py) if it can be imported. A GPU is found by its UUID, never by its
index, which CUDA_VISIBLE_DEVICES changes.

Functions, units and bits: https://docs.nvidia.com/deploy/nvml-api
"""

import importlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

CLOCK_REASONS = {  # group__nvmlClocksEventReasons
    0x001: "idle",
    0x002: "application clocks setting",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock setting",
    0x200: "board limit",
    0x400: "reliability limit",
}
HARMLESS = ("idle", "application clocks setting")
# Large matrix products hold every GPU at its power limit. The clock then stays at about 70 to 95 %
# of its maximum; below that, the limit was lowered or the GPU is not cooled well.
POWER_CAP, USUAL_CLOCK = "software power cap", 0.7


@dataclass(frozen=True, kw_only=True)
class GpuSample:
    """One reading of a GPU at the beginning of a step; None where the driver has no value."""

    step: int
    at_s: float  # monotonic clock
    sm_clock_hz: float | None
    memory_clock_hz: float | None
    power_w: float | None
    temperature_c: float | None
    energy_j: float | None  # a counter since the driver was loaded
    clock_reasons: tuple[str, ...] | None  # why the clock is below its maximum


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy of some steps by one GPU's counter, and their number; both None with a reason."""

    joules: float | None = None
    num_steps: int | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields of a record."""
        return {"joules": self.joules, "joules_num_steps": self.num_steps}


def energy_between_samples(samples: Sequence[Mapping[str, Any]], steps: Collection[int]) -> Energy:
    """Returns the energy of those `steps` between two samples that have no other step in between.

    Two samples at the same step enclose a validation, which is not a step. The host runs ahead of
    the device by the same number of steps at each sample, except at those around a validation,
    where it waits: the excess before the first one is missing after the second one.

    Args:
        samples: `GpuSample` as plain data, from one launch.
    """
    readings = [(s["step"], s["energy_j"]) for s in samples if s["energy_j"] is not None]
    joules, count = 0.0, 0
    for (start, before_j), (stop, after_j) in itertools.pairwise(readings):
        if after_j < before_j:  # an old pynvml reads 32 bits of the counter
            return Energy(reason=f"the energy counter fell from {before_j} to {after_j} J")
        if all(step in steps for step in range(start, stop)):
            joules += after_j - before_j if stop > start else 0.0
            count += stop - start
    if not count:
        return Energy(reason="fewer than two energy samples in the steady state")
    return Energy(joules=joules, num_steps=count)


def decode_clock_reasons(bits: int) -> tuple[str, ...]:
    """Returns names of the bits of nvmlDeviceGetCurrentClocksEventReasons."""
    ones = [1 << place for place in range(bits.bit_length()) if bits >> place & 1]
    return tuple(CLOCK_REASONS.get(one, f"unknown reason {one:#x}") for one in ones)


class Telemetry:
    """Follows one GPU: `start`, `at_step` at the beginning of every step, `stop`, `as_dict`.

    Args:
        uuid: that of `torch.cuda.get_device_properties`; None without a GPU.
        every_s: least seconds between two samples, which take a few hundred microseconds.
        nvml: a module with the functions of pynvml, which is the default.
        clock: seconds, for `every_s`.
    """

    def __init__(
        self,
        *,
        uuid: str | None,
        every_s: float = 1.0,
        nvml: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.every_s = every_s
        self.samples: list[GpuSample] = []
        self.missing: dict[str, str] = {}  # value -> why it is None
        self._uuid, self._nvml, self._clock = uuid, nvml, clock
        self._gpu: Any = None
        self._other_processes: dict[str, int | None] = {}
        self._max_sm_clock_hz: float | None = None

    def start(self, step: int = 0, *, holds_context: bool = False) -> None:
        """Takes the first sample; `holds_context`: whether this process has used the GPU."""
        self._gpu = self._find_gpu()
        if self._gpu is not None:
            kind = self._nvml.NVML_CLOCK_SM
            mhz = self._query("max_sm_clock_hz", "nvmlDeviceGetMaxClockInfo", kind)
            self._max_sm_clock_hz = None if mhz is None else mhz * 1e6
        self._count_other_processes("start", holds_context=holds_context)
        self.take_sample(step)

    def at_step(self, step: int) -> None:
        """Begins a step; takes a sample if the last one is `every_s` old."""
        if self._gpu is not None and self._clock() - self.samples[-1].at_s >= self.every_s:
            self.take_sample(step)

    def take_sample(self, step: int) -> None:
        """Reads the GPU now; also called at both ends of a validation, to exclude its energy."""
        if self._gpu is None:
            return
        nvml = self._nvml
        sm_clock_mhz = self._query("sm_clock_hz", "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)
        memory_mhz = self._query("memory_clock_hz", "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM)
        sensor = nvml.NVML_TEMPERATURE_GPU
        # NVML 12.2 renamed the function.
        reasons = "nvmlDeviceGetCurrentClocksEventReasons"
        if not hasattr(nvml, reasons):
            reasons = "nvmlDeviceGetCurrentClocksThrottleReasons"
        bits = self._query("clock_reasons", reasons)
        power_mw = self._query("power_w", "nvmlDeviceGetPowerUsage")
        energy_mj = self._query("joules", "nvmlDeviceGetTotalEnergyConsumption")
        self.samples.append(
            GpuSample(
                step=step,
                at_s=self._clock(),
                sm_clock_hz=None if sm_clock_mhz is None else sm_clock_mhz * 1e6,
                memory_clock_hz=None if memory_mhz is None else memory_mhz * 1e6,
                power_w=None if power_mw is None else power_mw / 1000,
                temperature_c=self._query("temperature_c", "nvmlDeviceGetTemperature", sensor),
                energy_j=None if energy_mj is None else energy_mj / 1000,
                clock_reasons=None if bits is None else decode_clock_reasons(bits),
            )
        )

    def stop(self, step: int) -> None:
        """Takes the last sample, after `step` steps, when the device has just become idle."""
        self.take_sample(step)
        self._count_other_processes("end", holds_context=True)
        if self._gpu is not None:
            self._nvml.nvmlShutdown()
            self._gpu = None

    def flags(self, start: int, stop: int) -> list[str]:
        """Returns a sentence for each thing that disturbed the GPU in steps [start, stop).

        The power cap is such a thing only if it holds the clock unusually low.
        """
        samples = [sample for sample in self.samples if start <= sample.step <= stop]
        limited: dict[str, list[GpuSample]] = {}
        for sample in samples:
            for reason in sample.clock_reasons or ():
                limited.setdefault(reason, []).append(sample)
        flags = []
        for reason, seen in limited.items():
            share = self._share_of_maximum(seen)
            is_usual = reason == POWER_CAP and share is not None and share >= USUAL_CLOCK
            if reason not in HARMLESS and not is_usual:
                at = "" if share is None else f", at {share:.0%} of its maximum"
                flags.append(
                    f"GPU clock limited by {reason} in {len(seen)} of {len(samples)} samples, "
                    f"first at step {seen[0].step}{at}"
                )
        for when, others in self._other_processes.items():
            if others:
                flags.append(f"GPU shared with {others} other process(es) at the {when}")
        return flags

    def _share_of_maximum(self, samples: Sequence[GpuSample]) -> float | None:
        clocks_hz = [sample.sm_clock_hz for sample in samples if sample.sm_clock_hz is not None]
        if not clocks_hz or not self._max_sm_clock_hz:
            return None
        return statistics.median(clocks_hz) / self._max_sm_clock_hz

    def as_dict(self, start: int, stop: int) -> dict[str, Any]:
        """Returns all samples, and the flags of steps [start, stop); readers compute the energy."""
        return {
            "samples": [asdict(sample) for sample in self.samples],
            "max_sm_clock_hz": self._max_sm_clock_hz,
            "other_processes": dict(self._other_processes),
            "flags": self.flags(start, stop),
            "missing": dict(self.missing),
        }

    def _find_gpu(self) -> Any:
        if self._uuid is None:
            self.missing["all"] = "no NVIDIA GPU"
            return None
        if self._nvml is None:
            try:
                self._nvml = importlib.import_module("pynvml")
            except ImportError:
                self.missing["all"] = "pynvml is missing: pip install nvidia-ml-py"
                return None
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            self.missing["all"] = f"NVML does not start: {error}"
            return None
        reasons = []
        for prefix in ("GPU-", "MIG-"):  # that of a GPU, or of a partition
            uuid = prefix + self._uuid.removeprefix("GPU-").removeprefix("MIG-")
            try:
                return self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            except self._nvml.NVMLError as error:
                reasons.append(f"{uuid}: {error}")
        self.missing["all"] = f"NVML does not find the GPU: {'; '.join(reasons)}"
        self._nvml.nvmlShutdown()
        return None

    def _query(self, value: str, function: str, *arguments: object) -> Any:
        """Calls NVML; returns None, and notes the reason, if GPU or driver do not support it."""
        try:
            return getattr(self._nvml, function)(self._gpu, *arguments)
        except self._nvml.NVMLError as error:
            self.missing[value] = f"{function}: {error}"
            return None

    def _count_other_processes(self, when: str, *, holds_context: bool) -> None:
        if self._gpu is None:
            return
        running = self._query("other_processes", "nvmlDeviceGetComputeRunningProcesses")
        self._other_processes[when] = None
        if running is None:
            return
        pids = {process.pid for process in running}
        if os.getpid() in pids or not holds_context:
            self._other_processes[when] = len(pids - {os.getpid()})
        elif pids:  # in a container, this process has another id on the host
            self._other_processes[when] = len(pids) - 1
        else:
            self.missing["other_processes"] = "the driver does not list even this process"
