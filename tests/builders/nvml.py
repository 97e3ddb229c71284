"""A fake NVML: a GPU driver without a GPU."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from unitransformer.measure.nvml import Telemetry

UUID = "5f2a1c9e-0000-1111-2222-333344445555"


class NVMLError(Exception):
    """The exception that pynvml raises."""


class FakeNvml:
    """Functions of pynvml for one GPU; energy and throttle reasons are given reading by reading."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(
        self,
        *,
        uuid: str = f"GPU-{UUID}",
        energy_mj: Sequence[int] | None = (0,),
        reasons: Sequence[int] = (0,),
        processes: Sequence[int] = (),
        has_driver: bool = True,
        sm_clock_mhz: int = 1980,
    ) -> None:
        self.sm_clock_mhz = sm_clock_mhz
        self.uuid, self.processes, self.has_driver = uuid, processes, has_driver
        self.energy_mj = None if energy_mj is None else list(energy_mj)
        self.reasons = list(reasons)
        self.is_open = False

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise NVMLError("NVML Shared Library Not Found")
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:
        if uuid.decode() != self.uuid:
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {self.NVML_CLOCK_SM: self.sm_clock_mhz, self.NVML_CLOCK_MEM: 3201}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return {self.NVML_CLOCK_SM: 2000}[kind]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 61

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.energy_mj is None:
            raise NVMLError("Not Supported")
        return self.energy_mj.pop(0) if len(self.energy_mj) > 1 else self.energy_mj[0]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.reasons.pop(0) if len(self.reasons) > 1 else self.reasons[0]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.processes]


def follow(nvml: Any, *, steps: Sequence[int] = (0, 10), **names: Any) -> Telemetry:
    """Telemetry that read the GPU at these steps, each a second after the one before."""
    seconds = iter(range(1000))
    telemetry = Telemetry(
        **{"uuid": UUID, **names}, nvml=nvml, every_s=0, clock=lambda: next(seconds)
    )
    first, *between, last = steps
    telemetry.start(first)
    for step in between:
        telemetry.at_step(step)
    telemetry.stop(last)
    return telemetry
