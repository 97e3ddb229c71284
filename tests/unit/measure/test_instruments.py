"""Tests the instruments: in which step they count, and what happens when they fail."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.builders.nvml import UUID, FakeNvml
from tests.builders.records import make_config
from unitransformer.config import ParallelConfig, Strategy
from unitransformer.measure import instruments
from unitransformer.measure.instruments import Instruments, find_quiet_step
from unitransformer.measure.nvml import GpuSample

CPU = torch.device("cpu")


def test_the_gpu_clock_is_the_median_of_busy_readings() -> None:
    def sample(step: int, mhz: float | None) -> GpuSample:
        clock = None if mhz is None else mhz * 1e6
        return GpuSample(
            **{"step": step, "at_s": float(step), "power_w": None, "temperature_c": None},
            **{"energy_j": None, "clock_reasons": None},
            sm_clock_hz=clock,
            memory_clock_hz=None,
        )

    reader = Instruments(make_config(), first_step=0)
    assert reader._median_clocks() == {}
    reader.telemetry.samples = [sample(0, 345), sample(1, 1980), sample(2, 1965), sample(3, 1980)]
    reader.telemetry.samples.append(sample(4, 345))
    assert reader._median_clocks() == {"sm_clock_hz": 1980e6, "memory_clock_hz": None}
    reader.telemetry.samples = [sample(0, 345)]
    assert reader._median_clocks()["sm_clock_hz"] == 345e6


@pytest.mark.parametrize(
    ("validate_every", "checkpoint_every", "first_step", "step"),
    [
        (50, 0, 0, 3),  # buffers have settled
        (50, 0, 20, 23),  # of a resumed run
        (3, 0, 0, 5),  # steps 4 and 5 have no validation before, between or after them
        (50, 3, 0, 5),
        (2, 0, 0, None),
        (50, 1, 0, None),
    ],
)
def test_tensor_bytes_are_counted_in_a_step_that_only_trains(
    validate_every: int, checkpoint_every: int, first_step: int, step: int | None
) -> None:
    config = replace(
        make_config(num_steps=40), validate_every=validate_every, checkpoint_every=checkpoint_every
    )
    assert find_quiet_step(config, first_step) == step


def test_a_run_that_ends_before_its_buffers_settle_has_no_quiet_step() -> None:
    assert find_quiet_step(make_config(num_steps=3), 0) is None


@pytest.mark.parametrize(
    ("strategy", "devices", "accumulate", "steps"),
    [("ddp", 2, 1, [7, 8]), ("ddp", 2, 4, [7]), ("ddp", 1, 1, []), ("fsdp", 2, 1, [])],
)
def test_steps_before_ddp_divides_gradients_into_buckets_are_excluded(
    strategy: Strategy, devices: int, accumulate: int, steps: list[int]
) -> None:
    parallel = ParallelConfig(strategy=strategy, devices=devices)
    config = replace(make_config(), parallel=parallel, accumulate=accumulate)
    reasons = Instruments(config, first_step=7).excluded_steps
    assert reasons == dict.fromkeys(steps, "gradients reduced in one bucket")


def test_a_device_too_full_to_measure_a_ceiling_still_finishes_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("injected: no memory left")

    monkeypatch.setattr(instruments, "measure_ceiling", fill)
    reader = Instruments(make_config(), first_step=0)
    reader._measure_ceiling(CPU)
    reading = reader.reading(CPU)
    assert reading["ceiling"] is None
    assert reading["flags"] == ["a ceiling could not be measured: injected: no memory left"]


def test_a_ceiling_merges_measurements_before_and_after_training() -> None:
    reader = Instruments(replace(make_config(), ceiling_s=0.02), first_step=0)
    for _ in range(2):
        reader._measure_ceiling(CPU)
    ceiling = reader.reading(CPU)["ceiling"]
    assert ceiling["dtype"] == "float32"
    assert ceiling["elapsed_s"] > 0
    best = max(p["work"] / min(p["seconds"]) for p in ceiling["matmul"])
    assert ceiling["matmul_flops_per_s"] == best


def test_nvml_is_not_asked_about_a_gpu_of_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="AMD Instinct MI300X", uuid=UUID)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda of: properties)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda of: None)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(has_driver=False))
    reader = Instruments(replace(make_config(), ceiling_s=0.0), first_step=0)
    module: Any = SimpleNamespace(device=torch.device("cuda", 0))
    reader.on_train_start(SimpleNamespace(global_step=0), module)  # type: ignore[arg-type]
    assert reader.telemetry.missing == {"all": "no NVIDIA GPU"}


def test_gpu_telemetry_and_peak_memory_begin_with_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, used = torch.device("cuda", 1), {"allocated": 900, "reserved": 950}
    asked: list[str] = []

    def forget(of: torch.device) -> None:
        assert of == device
        used.update(allocated=100, reserved=200)

    properties = SimpleNamespace(name="NVIDIA H200", total_memory=2**37, uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda of: properties)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forget)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda of: used["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda of: used["reserved"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda of: asked.append("synchronize"))
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(energy_mj=[0, 1000, 5000, 6000]))

    reader = Instruments(replace(make_config(), ceiling_s=0.0), first_step=0)
    trainer: Any = SimpleNamespace(global_step=0)
    objective = SimpleNamespace(network=SimpleNamespace(transformer_layers=[]))
    module: Any = SimpleNamespace(device=device, objective=objective)
    reader.on_train_start(trainer, module)
    trainer.global_step = 1
    reader.on_train_batch_end(trainer, module)
    assert asked == [], "a step waits for nothing"
    reader.on_validation_start(trainer, module)
    reader.on_validation_end()
    reader.on_train_end(trainer, module)
    used.update(allocated=800, reserved=800)  # readings after training do not count
    reading = reader.reading(device)
    assert reading["hardware"]["device"] == "NVIDIA H200"
    assert reading["hardware"]["device_memory_bytes"] == 2**37
    assert reading["hardware"]["sm_clock_hz"] == 1.98e9
    assert (reading["peak_bytes"], reading["peak_reserved_bytes"]) == (100, 200)
    assert reading["tensor_bytes"] is None
    samples_taken = [(sample["step"], sample["energy_j"]) for sample in reading["gpu"]["samples"]]
    assert samples_taken == [(0, 0.0), (1, 1.0), (1, 5.0), (1, 6.0)]
