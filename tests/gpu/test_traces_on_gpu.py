"""Tests traces and telemetry of a real GPU."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from unitransformer.measure.nvml import Telemetry, energy_between_samples
from unitransformer.profiling.trace_breakdown import HEAD, WINDOW, time_shares, window_seconds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_kernels_of_a_real_trace_are_attributed_to_the_operators_that_launched_them(
    tmp_path: Path,
) -> None:
    side = torch.randn(2048, 2048, device="cuda", requires_grad=True)
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    (side @ side).sum().backward()
    with profile(activities=kinds, record_shapes=True) as profiled, record_function(WINDOW):
        start_s = time.perf_counter()
        body = side @ side
        with record_function(HEAD):
            loss = (body @ side).sum()
        loss.backward()
        torch.cuda.synchronize()
        elapsed_s = time.perf_counter() - start_s
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    # Kineto repeats the range for each stream, which would add as much again.
    assert 0.9 * elapsed_s < window_seconds(trace) < 1.5 * elapsed_s
    shares = time_shares(trace, on_gpu=True)
    assert sum(shares.values()) == pytest.approx(1)
    # Three equal products each, backward included; the head also has the sum.
    assert shares["head and loss"] > 0.8 * shares["matrix multiply"] > 0
    assert shares["idle"] < 1


def test_telemetry_reads_the_energy_of_a_real_gpu() -> None:
    telemetry = Telemetry(uuid=str(torch.cuda.get_device_properties(0).uuid))
    telemetry.start(0, holds_context=True)
    side = torch.randn(4096, 4096, device="cuda")
    for _ in range(2000):
        side = (side @ side).clamp(-1, 1)
    torch.cuda.synchronize()
    telemetry.stop(2000)
    actual = telemetry.as_dict(0, 2000)
    assert len(actual["samples"]) == 2
    assert actual["samples"][1]["sm_clock_hz"] > 1e8
    joules = energy_between_samples(actual["samples"], range(2000)).joules
    assert joules is None or joules > 0
