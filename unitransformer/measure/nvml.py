"""What an NVIDIA GPU says of itself while a run uses it: clocks, power, heat, energy, company.

NVML through `pynvml` (package nvidia-ml-py), where it can be imported; a GPU is found by its UUID
or its place on the PCI bus, never by an index: CUDA_VISIBLE_DEVICES numbers them anew.

Functions, units and bits: https://docs.nvidia.com/deploy/nvml-api
"""

import importlib
import itertools
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# group__nvmlClocksEventReasons; the first two say nothing bad of a run.
CLOCK_REASONS = {
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


@dataclass(frozen=True, kw_only=True)
class GpuSample:
    """One look at a GPU when a step begins; None where the driver does not tell."""

    step: int
    at_s: float  # monotonic clock
    sm_clock_hz: float | None
    memory_clock_hz: float | None
    power_w: float | None
    temperature_c: float | None
    energy_j: float | None  # a counter since the driver was loaded
    clock_reasons: tuple[str, ...] | None  # why the clock is not the highest


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules of some steps by the counter of one GPU; None together with their number."""

    joules: float | None = None
    num_steps: int | None = None
    reason: str | None = None  # why there are none

    def as_dict(self) -> dict[str, Any]:
        """As they stand in a record."""
        return {"joules": self.joules, "joules_of_steps": self.num_steps}


def energy_of(looks: Sequence[Mapping[str, Any]], steps: Collection[int]) -> Energy:
    """Of all of `steps` that lie between two looks with nothing else between them.

    Between two looks at the same step lies a validation, which is no step. The host runs ahead of
    the device by as many steps at one look as at the next, and nowhere at those around validation:
    what it takes too much before one it takes too little behind it.

    Args:
        looks: `GpuSample` as plain data, of one launch.
    """
    told = [(look["step"], look["energy_j"]) for look in looks if look["energy_j"] is not None]
    joules, count = 0.0, 0
    for (start, before_j), (stop, after_j) in itertools.pairwise(told):
        if after_j < before_j:  # an old pynvml reads 32 bits of the counter
            return Energy(reason=f"the energy counter fell from {before_j} to {after_j} J")
        if all(step in steps for step in range(start, stop)):
            joules += after_j - before_j if stop > start else 0.0
            count += stop - start
    if not count:
        return Energy(reason="fewer than two looks at the energy in the window")
    return Energy(joules=joules, num_steps=count)


def clock_reasons(bits: int) -> tuple[str, ...]:
    """The names of the bits of nvmlDeviceGetCurrentClocksEventReasons; an unknown one by number."""
    ones = [1 << place for place in range(bits.bit_length()) if bits >> place & 1]
    return tuple(CLOCK_REASONS.get(one, f"unknown reason {one:#x}") for one in ones)


def names_of(properties: Any) -> dict[str, str | None]:
    """`uuid` and `pci_bus_id` of what `torch.cuda.get_device_properties` returns."""
    uuid = getattr(properties, "uuid", None)
    places = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    told = [place for place in places if place is not None]
    return {
        "uuid": None if uuid is None else str(uuid),
        "pci_bus_id": "{:08x}:{:02x}:{:02x}.0".format(*told) if len(told) == 3 else None,
    }


class Telemetry:
    """Follows one GPU: `start`, `at_step` at the beginning of every step, `stop`, `as_dict`.

    Args:
        uuid, pci_bus_id: what `names_of` says of the device; both None: no NVIDIA GPU (a CPU, or
            torch.version.hip is set).
        every_s: least seconds between two looks, which cost a few hundred microseconds.
        nvml: something with the functions of pynvml; by default pynvml itself.
        clock: seconds, for `every_s`.
    """

    def __init__(
        self,
        *,
        uuid: str | None,
        pci_bus_id: str | None = None,
        every_s: float = 1.0,
        nvml: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.every_s = every_s
        self.samples: list[GpuSample] = []
        self.untold: dict[str, str] = {}  # what is None, and why
        self._uuid, self._pci_bus_id = uuid, pci_bus_id
        self._nvml = nvml
        self._clock = clock
        self._gpu: Any = None
        self._company: dict[str, int | None] = {}

    def start(self, step: int = 0, *, holds_context: bool = False) -> None:
        """First look.

        Args:
            holds_context: this process has used the GPU already (`torch.cuda.is_initialized()`).
        """
        self._gpu = self._find()
        self._meet("start", holds_context=holds_context)
        self._look(step)

    def at_step(self, step: int) -> None:
        """Step `step` begins; looks if the last look is `every_s` ago."""
        if self._gpu is not None and self._clock() - self.samples[-1].at_s >= self.every_s:
            self._look(step)

    def at_validation(self, step: int) -> None:
        """A validation begins or ends behind `step` steps: what it costs is to be told apart."""
        self._look(step)

    def stop(self, step: int) -> None:
        """Last look: `step` steps are done, the device has just become idle."""
        self._look(step)
        self._meet("end", holds_context=True)
        if self._gpu is not None:
            self._nvml.nvmlShutdown()
            self._gpu = None

    def flags(self, start: int, stop: int) -> list[str]:
        """What makes the steps [start, stop) unlike those of a GPU at rest and alone, in words."""
        held: dict[str, list[int]] = {}
        for look in self.samples:
            if start <= look.step <= stop:
                for reason in look.clock_reasons or ():
                    held.setdefault(reason, []).append(look.step)
        found = [
            f"GPU clock held down by {reason} at {len(steps)} looks, first at step {steps[0]}"
            for reason, steps in held.items()
            if reason not in HARMLESS
        ]
        for when, others in self._company.items():
            if others:
                found.append(f"GPU shared with {others} other process(es) at the {when}")
        return found

    def as_dict(self, start: int, stop: int) -> dict[str, Any]:
        """All samples, and what they say of the window [start, stop); joules are the readers'."""
        return {
            "samples": [asdict(look) for look in self.samples],
            "other_processes": dict(self._company),
            "flags": self.flags(start, stop),
            "untold": dict(self.untold),
        }

    def _find(self) -> Any:
        if self._uuid is None and self._pci_bus_id is None:
            self.untold["all"] = "no NVIDIA GPU"
            return None
        if self._nvml is None:
            try:
                self._nvml = importlib.import_module("pynvml")
            except ImportError:
                self.untold["all"] = "pynvml is missing: pip install nvidia-ml-py"
                return None
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            self.untold["all"] = f"NVML does not start: {error}"
            return None
        return self._handle()

    def _handle(self) -> Any:
        reasons = []
        for name, find in self._names():
            try:
                return find(name.encode())
            except self._nvml.NVMLError as error:
                reasons.append(f"{name}: {error}")
        self.untold["all"] = f"NVML does not find the GPU: {'; '.join(reasons)}"
        self._nvml.nvmlShutdown()
        return None

    def _names(self) -> Sequence[tuple[str, Callable[[bytes], Any]]]:
        by_uuid = self._nvml.nvmlDeviceGetHandleByUUID
        names = []
        if self._uuid is not None:
            # A part of a divided GPU has a UUID of its own kind.
            bare = self._uuid.removeprefix("GPU-").removeprefix("MIG-")
            names = [(f"GPU-{bare}", by_uuid), (f"MIG-{bare}", by_uuid)]
        if self._pci_bus_id is not None:
            names.append((self._pci_bus_id, self._nvml.nvmlDeviceGetHandleByPciBusId))
        return names

    def _ask(self, what: str, function: str, *arguments: object) -> Any:
        """None if this GPU or driver does not tell, with the reason kept."""
        try:
            return getattr(self._nvml, function)(self._gpu, *arguments)
        except self._nvml.NVMLError as error:
            self.untold[what] = f"{function}: {error}"
            return None

    def _look(self, step: int) -> None:
        if self._gpu is None:
            return
        nvml = self._nvml
        sm_clock_mhz = self._ask("sm_clock_hz", "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)
        memory_mhz = self._ask("memory_clock_hz", "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM)
        kind = nvml.NVML_TEMPERATURE_GPU
        bits = self._ask("clock_reasons", self._reasons_function())
        self.samples.append(
            GpuSample(
                step=step,
                at_s=self._clock(),
                sm_clock_hz=_over(1e-6, sm_clock_mhz),
                memory_clock_hz=_over(1e-6, memory_mhz),
                power_w=_over(1000, self._ask("power_w", "nvmlDeviceGetPowerUsage")),
                temperature_c=self._ask("temperature_c", "nvmlDeviceGetTemperature", kind),
                energy_j=_over(1000, self._ask("joules", "nvmlDeviceGetTotalEnergyConsumption")),
                clock_reasons=None if bits is None else clock_reasons(bits),
            )
        )

    def _reasons_function(self) -> str:
        # NVML 12.2 gave it a new name.
        new = "nvmlDeviceGetCurrentClocksEventReasons"
        return new if hasattr(self._nvml, new) else "nvmlDeviceGetCurrentClocksThrottleReasons"

    def _meet(self, when: str, *, holds_context: bool) -> None:
        """Count other processes on the GPU."""
        if self._gpu is None:
            return
        running = self._ask("other_processes", "nvmlDeviceGetComputeRunningProcesses")
        self._company[when] = None
        if running is None:
            return
        numbers = {process.pid for process in running}
        if os.getpid() in numbers or not holds_context:
            self._company[when] = len(numbers - {os.getpid()})
        elif numbers:  # one of them is this process, under the number it has outside a container
            self._company[when] = len(numbers) - 1
        else:
            self.untold["other_processes"] = "the driver does not list even this process"


def _over(unit: float, value: float | None) -> float | None:
    return None if value is None else value / unit
