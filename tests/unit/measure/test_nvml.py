"""Tests GPU telemetry with a fake NVML."""

import os
from typing import Any

import pytest

from tests.builders.nvml import UUID, FakeNvml, follow
from unitransformer.measure.nvml import (
    Energy,
    Telemetry,
    decode_clock_reasons,
    energy_between_samples,
)

POWER_CAP, IDLE, HOT = 0x4, 0x1, 0x20


def test_a_reading_is_in_base_units() -> None:
    sample = follow(FakeNvml()).samples[0]
    assert (sample.sm_clock_hz, sample.memory_clock_hz) == (1.98e9, 3.201e9)
    assert (sample.power_w, sample.temperature_c) == (700, 61)


@pytest.mark.parametrize("prefix", ["GPU-", "MIG-"])
@pytest.mark.parametrize("given", ["", "GPU-"])
def test_a_gpu_is_found_by_its_uuid_with_any_prefix(prefix: str, given: str) -> None:
    telemetry = follow(FakeNvml(uuid=prefix + UUID), uuid=given + UUID)
    assert len(telemetry.samples) == 2


def test_another_gpu_is_not_read_in_place_of_this_one() -> None:
    nvml = FakeNvml(uuid="GPU-another")
    actual = follow(nvml).as_dict(0, 10)
    assert actual["samples"] == []
    assert "does not find the GPU" in actual["missing"]["all"]
    assert not nvml.is_open


def samples(*actual: tuple[int, float | None]) -> list[dict[str, Any]]:
    return [{"step": step, "energy_j": joules} for step, joules in actual]


def test_energy_is_the_difference_between_readings_at_the_given_steps() -> None:
    # Readings at steps 0, 4, 8 and 12; steady from step 4: 8 steps, 2,000 J.
    four = samples((0, 0.0), (4, 500.0), (8, 1000.0), (12, 2500.0))
    assert energy_between_samples(four, range(4, 12)) == Energy(joules=2000, num_steps=8)
    assert energy_between_samples(four, range(2, 11)) == Energy(joules=500, num_steps=4), (
        "no sample at the ends"
    )


def test_energy_of_validation_and_unsteady_steps_is_excluded() -> None:
    # A validation after step 4 takes 300 J; step 9 compiled.
    six = samples((0, 0.0), (4, 40.0), (4, 340.0), (8, 380.0), (10, 999.0), (12, 1019.0))
    steady = [step for step in range(12) if step != 9]
    assert energy_between_samples(six, steady) == Energy(joules=100, num_steps=10)


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        (samples((0, 0.0), (4, 1.0), (12, 2.0)), "fewer than two energy samples"),
        (samples((4, None), (6, None)), "fewer than two energy samples"),
        (samples((4, 4_294_967.0), (6, 1.0)), "fell from 4294967.0 to 1.0 J"),
    ],
)
def test_missing_energy_has_a_reason(expected: list[dict[str, Any]], reason: str) -> None:
    energy = energy_between_samples(expected, range(3, 8))
    assert energy.as_dict() == {"joules": None, "joules_num_steps": None}
    assert reason in (energy.reason or "")


def test_telemetry_reads_at_both_ends_of_a_validation() -> None:
    telemetry = Telemetry(uuid=UUID, nvml=FakeNvml(), every_s=1000)
    telemetry.start()
    telemetry.take_sample(3)
    telemetry.take_sample(3)
    telemetry.stop(5)
    assert [sample.step for sample in telemetry.samples] == [0, 3, 3, 5]


def test_an_old_gpu_without_an_energy_counter_has_no_energy_with_a_reason() -> None:
    actual = follow(FakeNvml(energy_mj=None)).as_dict(0, 10)
    assert actual["missing"]["joules"].endswith("Not Supported")
    assert actual["samples"][0]["power_w"] == 700


def test_throttle_reasons_have_the_names_of_the_nvml_manual() -> None:
    assert decode_clock_reasons(0) == ()
    assert decode_clock_reasons(0x24) == ("software power cap", "software thermal slowdown")
    assert decode_clock_reasons(0xC8) == (
        "hardware slowdown",
        "hardware thermal slowdown",
        "hardware power brake",
    )
    assert decode_clock_reasons(0x10000) == ("unknown reason 0x10000",)


def test_a_throttled_clock_in_the_steady_window_is_flagged_with_its_reason() -> None:
    telemetry = follow(FakeNvml(reasons=[IDLE, 0, HOT, HOT, IDLE]), steps=range(5))
    assert telemetry.flags(1, 4) == [
        "GPU clock limited by software thermal slowdown in 2 of 4 samples, first at step 2, at 99% "
        "of its maximum"
    ]
    assert telemetry.flags(0, 1) == []


@pytest.mark.parametrize(("sm_clock_mhz", "is_flagged"), [(1400, False), (1380, True)])
def test_the_power_cap_of_a_busy_gpu_is_flagged_only_if_it_holds_the_clock_very_low(
    sm_clock_mhz: int, is_flagged: bool
) -> None:
    nvml = FakeNvml(reasons=[IDLE, POWER_CAP, POWER_CAP, IDLE], sm_clock_mhz=sm_clock_mhz)
    telemetry = follow(nvml, steps=range(4))
    flags = [
        "GPU clock limited by software power cap in 2 of 4 samples, first at step 1, at 69% of its "
        "maximum"
    ]
    assert telemetry.flags(0, 3) == (flags if is_flagged else [])
    assert telemetry.as_dict(0, 3)["max_sm_clock_hz"] == 2e9


def test_a_power_cap_is_flagged_where_the_driver_does_not_tell_the_highest_clock() -> None:
    class Old(FakeNvml):
        def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
            raise self.NVMLError("Not Supported")

    telemetry = follow(Old(reasons=[POWER_CAP]))
    assert telemetry.flags(0, 10) == [
        "GPU clock limited by software power cap in 2 of 2 samples, first at step 0"
    ]
    assert telemetry.as_dict(0, 10)["missing"]["max_sm_clock_hz"].endswith("Not Supported")


def test_an_old_driver_is_read_through_its_old_function_names() -> None:
    class Old(FakeNvml):
        def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
            return POWER_CAP

        def __getattribute__(self, name: str) -> Any:
            if name == "nvmlDeviceGetCurrentClocksEventReasons":
                raise AttributeError(name)
            return super().__getattribute__(name)

    assert follow(Old()).samples[0].clock_reasons == ("software power cap",)


def test_other_processes_on_the_gpu_are_flagged() -> None:
    actual = follow(FakeNvml(processes=[os.getpid(), 1_000_001])).as_dict(0, 10)
    assert actual["other_processes"] == {"start": 1, "end": 1}
    assert "GPU shared with 1 other process(es) at the end" in actual["flags"]


def test_a_gpu_without_other_processes_has_no_flag() -> None:
    assert follow(FakeNvml(processes=[os.getpid()])).flags(0, 10) == []


def test_one_unknown_process_id_in_a_container_is_this_process() -> None:
    telemetry = Telemetry(uuid=UUID, nvml=FakeNvml(processes=[1_000_001]))
    telemetry.start(0, holds_context=True)
    telemetry.stop(10)
    assert telemetry.as_dict(0, 10)["other_processes"] == {"start": 0, "end": 0}


def test_an_empty_process_list_does_not_prove_that_the_gpu_is_not_shared() -> None:
    actual = follow(FakeNvml(processes=[])).as_dict(0, 10)
    assert actual["other_processes"]["end"] is None
    assert "not list even this process" in actual["missing"]["other_processes"]


def test_readings_are_at_least_the_given_interval_apart() -> None:
    seconds = iter([0.0, 0.5, 1.0, 1.0, 5.0])  # start; step 1; step 2 and its reading; stop
    telemetry = Telemetry(uuid=UUID, nvml=FakeNvml(), every_s=1.0, clock=lambda: next(seconds))
    telemetry.start()
    telemetry.at_step(1)
    telemetry.at_step(2)
    telemetry.stop(3)
    assert [sample.step for sample in telemetry.samples] == [0, 2, 3]


def test_telemetry_without_an_nvidia_gpu_is_none_with_the_reason() -> None:
    actual = follow(FakeNvml(), uuid=None).as_dict(0, 10)
    assert (actual["samples"], actual["flags"]) == ([], [])
    assert actual["missing"]["all"] == "no NVIDIA GPU"


def test_telemetry_without_a_driver_has_that_reason() -> None:
    assert "Library Not Found" in follow(FakeNvml(has_driver=False)).missing["all"]


def test_telemetry_without_pynvml_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in follow(None).missing["all"]


def test_nvml_is_closed_at_the_end() -> None:
    nvml = FakeNvml()
    follow(nvml)
    assert not nvml.is_open
