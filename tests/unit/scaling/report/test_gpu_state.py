"""Tests the GPU values in the row of a run: energy, clocks, temperature, throttle reasons."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scaling.store.reader import load_store
from tests.builders.nvml import FakeNvml, follow
from tests.builders.records import make_config, make_record
from tests.builders.reports import cells, render
from unitransformer.measure.instruments import Instruments
from unitransformer.record.schema import write_record
from unitransformer.recording import _with_energy

POWER_CAP = 0x4


class Warming(FakeNvml):
    """Readings of a GPU that gets warmer and slower."""

    def __init__(self, **actual: Any) -> None:
        super().__init__(**actual)
        self.looks = 0

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        self.looks += 1
        return 40 + 10 * self.looks

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return super().nvmlDeviceGetClockInfo(handle, kind) - 100 * self.looks


def reading(nvml: Any) -> dict[str, Any]:
    """The record of a rank with GPU readings at steps 0, 5 and 10, and steady from step 2."""
    watching = Instruments(make_config(), first_step=0)
    watching.telemetry = follow(nvml, steps=(0, 5, 10))
    watching._step = 10
    found = watching.reading(torch.device("cpu"))
    return found | {"gpu": _with_energy(found["gpu"], range(2, 12))}


def row_of(*readings: dict[str, Any]) -> dict[str, str]:
    record = make_record(gpu=[each["gpu"] for each in readings], flags=[*readings[0]["flags"]])
    text = render(record)
    return {name: cells(text, name)[0] for name in ("energy", "GPU", "flags")}


def test_a_row_has_joules_clocks_power_and_temperature_at_start_and_end() -> None:
    # 1,600 J in 5 steady steps of 2 x 8 tokens; the warm-up used much more.
    row = row_of(reading(Warming(energy_mj=[0, 9_600_000, 11_200_000])))
    assert row["energy"] == "20 J per token, of 1 device, over 5 steady steps"
    assert "SM clock 1980 to 1780 MHz" in row["GPU"]
    assert "memory clock 3201 to 3001 MHz" in row["GPU"]
    assert "power 700 to 700 W" in row["GPU"]
    assert "temperature 50 to 70 °C" in row["GPU"]
    assert "throttle reasons: none of 3 samples" in row["GPU"]
    assert row["flags"] == "none"


def test_a_throttled_and_shared_gpu_is_flagged_on_its_row() -> None:
    reasons, processes = [0, POWER_CAP, POWER_CAP], [1_000_001, 1_000_002]
    nvml = Warming(reasons=reasons, processes=processes, sm_clock_mhz=1300)
    row = row_of(reading(nvml))
    assert "throttle reasons: software power cap in 2 of 3 samples" in row["GPU"]
    assert "limited by software power cap" in row["flags"]
    assert "GPU shared with" in row["flags"]


def test_several_gpus_have_their_range() -> None:
    row = row_of(reading(Warming()), reading(FakeNvml()))
    assert "of 2 devices" in row["GPU"]
    assert "temperature (50 … 61) to (61 … 70) °C" in row["GPU"]


def test_values_missing_from_the_driver_are_not_shown_as_numbers() -> None:
    actual = reading(FakeNvml())
    for look in actual["gpu"]["samples"]:
        look |= {"power_w": None, "clock_reasons": None}
    row = row_of(actual)
    assert "power ? to ? W" in row["GPU"]
    assert "throttle reasons not available from the driver" in row["GPU"]


def test_a_run_without_a_gpu_has_no_such_row() -> None:
    assert "| GPU " not in render(make_record())


@pytest.mark.parametrize(("field", "value"), [("temperature_c", "warm"), ("clock_reasons", 4)])
def test_an_invalid_reading_is_refused_with_its_position(
    field: str, value: object, tmp_path: Path
) -> None:
    actual = reading(FakeNvml())
    actual["gpu"]["samples"][1][field] = value
    write_record(make_record(gpu=[actual["gpu"]]), tmp_path / "a.json")
    (left_out,) = load_store([tmp_path], relative_to=tmp_path).left_out
    assert f"gpu.0.samples.1: {field} is" in left_out.reason
