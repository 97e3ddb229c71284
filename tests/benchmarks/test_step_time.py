"""Times a training step of each recipe at a small size, to compare with earlier times.

`make bench` stores times in a folder per machine; `pytest tests/benchmarks --benchmark-compare`
compares with them. Times of other machines are not comparable, so no test fails on them.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import tests.benchmarks.clock
from recipes.presets import Preset
from tests.benchmarks.clock import now_s
from tests.benchmarks.steps import PRESETS, build_step


@pytest.mark.alone
@pytest.mark.benchmark(timer=now_s)
@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_step_time(preset: Preset, benchmark: BenchmarkFixture) -> None:
    step = build_step(preset, 8)
    before = float(step())
    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
    assert float(step()) < before


def test_clock_synchronizes_the_gpu_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("waited"))
    clock = tests.benchmarks.clock.time
    monkeypatch.setattr(clock, "perf_counter", lambda: float(order == ["waited"]))
    assert now_s() == 1.0
