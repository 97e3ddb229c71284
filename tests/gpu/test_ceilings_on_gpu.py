"""Tests the measured ceilings of one real GPU."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unitransformer.machine import ceilings
from unitransformer.machine.calibration_store import read_calibration
from unitransformer.machine.ceilings import dtype_of, measure_ceiling, why_not_measured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)


def test_every_dtype_is_measured_and_a_smaller_one_is_not_slower() -> None:
    dtypes = [dtype for dtype, why in why_not_measured(GPU).items() if why is None]
    rates = {d: measure_ceiling(GPU, d, budget_s=1.0).matmul_flops_per_s for d in dtypes}
    assert rates["float16"] > rates["float32"]
    assert all(rate > 1e11 for rate in rates.values())


def test_measuring_restores_memory_random_states_and_settings() -> None:
    torch.zeros(1, device=GPU)
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state(GPU), torch.cuda.memory_allocated(GPU)
    setting = torch.get_float32_matmul_precision()
    measure_ceiling(GPU, dtype_of("32-true", GPU), budget_s=0.5)
    assert torch.equal(torch.cuda.get_rng_state(GPU), before[0])
    assert torch.cuda.memory_allocated(GPU) == before[1]
    assert torch.get_float32_matmul_precision() == setting


def test_an_unusual_product_is_hardly_faster_than_the_ceiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtype = dtype_of("32-true", GPU)
    ceiling = measure_ceiling(GPU, dtype, budget_s=1.0)
    more = sorted((*ceilings.CUDA_SHAPES, (6144, 3072, 12288)), key=math.prod)
    monkeypatch.setattr(ceilings, "CUDA_SHAPES", tuple(more))
    other = measure_ceiling(GPU, dtype, budget_s=1.0)
    assert other.matmul_flops_per_s < 1.1 * ceiling.matmul_flops_per_s


def test_the_command_names_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    done = subprocess.run(
        [sys.executable, "-m", "scaling", "calibrate", "--devices", "1", "--out", str(path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = read_calibration(path)
    assert torch.cuda.get_device_name(GPU) in found.machine.gpus
    assert "CUDA" in found.machine.software or "HIP" in found.machine.software
    assert json.loads(path.read_text())["figures"]["copy_bytes_per_s"] > 1e10
