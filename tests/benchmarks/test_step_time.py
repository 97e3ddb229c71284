"""Times a training step of each recipe at a small size, to compare with earlier times.

`make bench` stores times in a folder per machine; `pytest tests/benchmarks --benchmark-compare`
compares with them. Times of other machines are not comparable, so no test fails on them.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import tests.benchmarks.clock
from recipes import bert, gpt, vit
from recipes.presets import Preset
from tests.benchmarks.clock import now_s
from unitransformer.config import DataConfig, RunConfig
from unitransformer.data.sources import Synthetic
from unitransformer.objectives import Objective
from unitransformer.training.optimizer import build_optimizer
from unitransformer.transformer import Transformer

SMALL = {"width": 128, "num_layers": 2, "num_heads": 4, "feedforward_width": 512}
SHAPE = {
    "bert": SMALL | {"num_classes": 2000},
    "gpt": SMALL | {"num_classes": 2000},
    "vit": SMALL | {"image_size": 64, "patch_size": 16},
}


@pytest.mark.alone
@pytest.mark.benchmark(timer=now_s)
@pytest.mark.parametrize("preset", [bert.PRESET, gpt.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_step_time(preset: Preset, benchmark: BenchmarkFixture) -> None:
    torch.set_flush_denormal(True)
    config = RunConfig(
        recipe=preset.recipe,
        size="reference",
        model=preset.model_config("reference", **SHAPE[preset.recipe]),
        data=DataConfig(source="synthetic"),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = Objective(Transformer(config.model)).to(device)
    optimizer = build_optimizer(objective.network.named_parameters(), config)
    order = torch.arange(8)
    batch = Synthetic(config, 8).fill({"inputs": order, "targets": order}, device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = objective(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

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
