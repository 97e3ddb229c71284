"""Telemetry of a GPU that is not there: a fake NVML with the functions of pynvml."""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from unitransformer.measure.nvml import Energy, Telemetry, clock_reasons, energy_of, names_of

UUID = "5f2a1c9e-0000-1111-2222-333344445555"
POWER_CAP, IDLE = 0x4, 0x1


class NVMLError(Exception):
    """As pynvml's: a number and its words."""


class FakeNvml:
    """A GPU whose energy counter, and what holds its clock, are given look by look."""

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
    ) -> None:
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

    def nvmlDeviceGetHandleByPciBusId(self, place: bytes) -> str:
        if place != b"00000000:3b:00.0":
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 3201}[kind]

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


def test_a_look_is_in_plain_units() -> None:
    look = follow(FakeNvml()).samples[0]
    assert (look.sm_clock_hz, look.memory_clock_hz) == (1.98e9, 3.201e9)
    assert (look.power_w, look.temperature_c) == (700, 61)


@pytest.mark.parametrize("prefix", ["GPU-", "MIG-"])
@pytest.mark.parametrize("given", ["", "GPU-"])
def test_a_gpu_is_found_by_its_uuid_whatever_stands_before_it(prefix: str, given: str) -> None:
    telemetry = follow(FakeNvml(uuid=prefix + UUID), uuid=given + UUID)
    assert len(telemetry.samples) == 2


def test_a_gpu_without_a_known_uuid_is_found_by_its_place_on_the_bus() -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    names = names_of(properties)
    assert names == {"uuid": None, "pci_bus_id": "00000000:3b:00.0"}
    assert len(follow(FakeNvml(), **names).samples) == 2


def test_another_gpu_is_not_taken_for_this_one() -> None:
    nvml = FakeNvml(uuid="GPU-another")
    told = follow(nvml).as_dict(0, 10)
    assert told["samples"] == []
    assert "does not find the GPU" in told["untold"]["all"]
    assert not nvml.is_open


def looks(*told: tuple[int, float | None]) -> list[dict[str, Any]]:
    return [{"step": step, "energy_j": joules} for step, joules in told]


def test_joules_are_those_between_looks_at_the_asked_steps() -> None:
    # Looks at steps 0, 4, 8 and 12; the steady ones are from 4 on: 8 steps, 2,000 J.
    four = looks((0, 0.0), (4, 500.0), (8, 1000.0), (12, 2500.0))
    assert energy_of(four, range(4, 12)) == Energy(joules=2000, num_steps=8)
    assert energy_of(four, range(2, 11)) == Energy(joules=500, num_steps=4), "no look at the ends"


def test_joules_of_a_validation_and_of_disturbed_steps_are_left_out() -> None:
    # A validation behind step 4 takes 300 J; step 9 compiled.
    six = looks((0, 0.0), (4, 40.0), (4, 340.0), (8, 380.0), (10, 999.0), (12, 1019.0))
    steady = [step for step in range(12) if step != 9]
    assert energy_of(six, steady) == Energy(joules=100, num_steps=10)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (looks((0, 0.0), (4, 1.0), (12, 2.0)), "fewer than two looks"),
        (looks((4, None), (6, None)), "fewer than two looks"),
        (looks((4, 4_294_967.0), (6, 1.0)), "fell from 4294967.0 to 1.0 J"),
    ],
)
def test_joules_that_cannot_be_told_say_why(told: list[dict[str, Any]], reason: str) -> None:
    energy = energy_of(told, range(3, 8))
    assert energy.as_dict() == {"joules": None, "joules_of_steps": None}
    assert reason in (energy.reason or "")


def test_both_ends_of_a_validation_are_looked_at_however_soon() -> None:
    telemetry = Telemetry(uuid=UUID, nvml=FakeNvml(), every_s=1000)
    telemetry.start()
    telemetry.at_validation(3)
    telemetry.at_validation(3)
    telemetry.stop(5)
    assert [look.step for look in telemetry.samples] == [0, 3, 3, 5]


def test_an_old_gpu_without_the_counter_has_no_joules_and_says_why() -> None:
    told = follow(FakeNvml(energy_mj=None)).as_dict(0, 10)
    assert told["untold"]["joules"].endswith("Not Supported")
    assert told["samples"][0]["power_w"] == 700


def test_the_bits_have_the_names_of_the_nvml_manual() -> None:
    assert clock_reasons(0) == ()
    assert clock_reasons(0x24) == ("software power cap", "software thermal slowdown")
    assert clock_reasons(0xC8) == (
        "hardware slowdown",
        "hardware thermal slowdown",
        "hardware power brake",
    )
    assert clock_reasons(0x10000) == ("unknown reason 0x10000",)


def test_a_clock_held_down_within_the_window_is_flagged_in_words() -> None:
    telemetry = follow(FakeNvml(reasons=[IDLE, 0, POWER_CAP, POWER_CAP, IDLE]), steps=range(5))
    assert telemetry.flags(1, 4) == [
        "GPU clock held down by software power cap at 2 looks, first at step 2"
    ]
    assert telemetry.flags(0, 1) == []


def test_a_driver_with_the_old_names_is_asked_by_them() -> None:
    class Old(FakeNvml):
        def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
            return POWER_CAP

        def __getattribute__(self, name: str) -> Any:
            if name == "nvmlDeviceGetCurrentClocksEventReasons":
                raise AttributeError(name)
            return super().__getattribute__(name)

    assert follow(Old()).samples[0].clock_reasons == ("software power cap",)


def test_other_processes_on_the_gpu_are_flagged() -> None:
    told = follow(FakeNvml(processes=[os.getpid(), 1_000_001])).as_dict(0, 10)
    assert told["other_processes"] == {"start": 1, "end": 1}
    assert "GPU shared with 1 other process(es) at the end" in told["flags"]


def test_alone_on_the_gpu_nothing_is_flagged() -> None:
    assert follow(FakeNvml(processes=[os.getpid()])).flags(0, 10) == []


def test_in_a_container_one_unknown_number_is_this_process() -> None:
    telemetry = Telemetry(uuid=UUID, nvml=FakeNvml(processes=[1_000_001]))
    telemetry.start(0, holds_context=True)
    telemetry.stop(10)
    assert telemetry.as_dict(0, 10)["other_processes"] == {"start": 0, "end": 0}


def test_a_driver_that_lists_no_process_does_not_prove_to_be_alone() -> None:
    told = follow(FakeNvml(processes=[])).as_dict(0, 10)
    assert told["other_processes"]["end"] is None
    assert "not list even this process" in told["untold"]["other_processes"]


def test_looks_are_no_more_frequent_than_asked() -> None:
    seconds = iter([0.0, 0.5, 1.0, 1.0, 5.0])  # start; step 1; step 2 and its look; stop
    telemetry = Telemetry(uuid=UUID, nvml=FakeNvml(), every_s=1.0, clock=lambda: next(seconds))
    telemetry.start()
    telemetry.at_step(1)
    telemetry.at_step(2)
    telemetry.stop(3)
    assert [look.step for look in telemetry.samples] == [0, 2, 3]


def test_without_an_nvidia_gpu_everything_is_none_with_the_reason() -> None:
    told = follow(FakeNvml(), uuid=None).as_dict(0, 10)
    assert (told["samples"], told["flags"]) == ([], [])
    assert told["untold"]["all"] == "no NVIDIA GPU"


def test_without_a_driver_it_says_so() -> None:
    assert "Library Not Found" in follow(FakeNvml(has_driver=False)).untold["all"]


def test_without_pynvml_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in follow(None).untold["all"]


def test_nvml_is_closed_at_the_end() -> None:
    nvml = FakeNvml()
    follow(nvml)
    assert not nvml.is_open
