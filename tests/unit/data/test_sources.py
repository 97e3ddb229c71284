"""Tests synthetic samples: what they cost in a step, and that they differ."""

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from recipes import bert, gpt, vit
from recipes.presets import Preset
from tests.builders.operators import OperatorCounter
from unitransformer.config import DataConfig, RunConfig
from unitransformer.data.datamodule import DataModule
from unitransformer.data.sources import NUM_SYNTHETIC, Synthetic, load_source
from unitransformer.objectives import Batch, Objective
from unitransformer.training.optimizer import build_optimizer
from unitransformer.transformer import Transformer

CPU = torch.device("cpu")
presets = pytest.mark.parametrize(
    "preset", [bert.PRESET, gpt.PRESET, vit.PRESET], ids=lambda preset: preset.recipe
)


def config_of(preset: Preset, **model: Any) -> RunConfig:
    return RunConfig(
        recipe=preset.recipe,
        size="reference",
        model=preset.model_config("reference", **model),
        data=DataConfig(source="synthetic"),
        batch_size=64,
        max_steps=6,
    )


def fill(samples: Synthetic, *indices: int) -> Batch:
    order = torch.tensor(indices)
    return samples.fill({"inputs": order, "targets": order}, CPU)


def allocate(network: Transformer) -> None:
    """Gives a network on the meta device fake tensors, which `to_empty` cannot."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape)))
        for name, table in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(table.shape))


@presets
def test_synthetic_data_is_at_most_a_hundredth_of_a_step(preset: Preset) -> None:
    """In operators and in bytes. Drawing 64 images inside of the step would move 3.7 GB."""
    config = config_of(preset)
    with torch.device("meta"):
        network = Transformer(config.model)
    with FakeTensorMode():
        allocate(network)
        objective, samples = Objective(network), Synthetic(config, NUM_SYNTHETIC)
        optimizer = build_optimizer(network.named_parameters(), config)
        samples.draw(CPU)
        for _ in range(2):  # the first step creates AdamW's moments
            with OperatorCounter() as data:
                batch = fill(samples, *range(64))
            with OperatorCounter() as step:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = objective(batch)
                loss.backward()
                optimizer.step()
    num_operators = 1 + len(data.names)  # the first one copies the indices to the device
    assert 2 <= num_operators <= 0.01 * len(step.names), data.names
    assert batch["inputs"].nbytes < data.num_bytes <= 0.01 * step.num_bytes


@presets
def test_no_two_synthetic_samples_are_equal(preset: Preset) -> None:
    model = {"image_size": 16, "patch_size": 8} if preset.recipe == "vit" else {}
    samples = Synthetic(config_of(preset, **model), 2000)
    inputs = fill(samples, *range(2000))["inputs"].flatten(1)
    assert len({tuple(row) for row in inputs.tolist()}) == 2000


@presets
def test_synthetic_samples_are_spread_over_their_values(preset: Preset) -> None:
    config = config_of(preset)
    batch = fill(Synthetic(config, 2000), *range(0, 2000, 20))
    inputs, targets = batch["inputs"].double(), batch["targets"]
    assert 0 <= targets.min() < targets.max() < config.model.num_classes
    if preset.recipe == "vit":
        assert inputs.mean().item() == pytest.approx(0, abs=0.02)
        assert inputs.std().item() == pytest.approx(1, abs=0.02)
    else:
        middle = config.model.num_classes / 2
        assert inputs.mean().item() == pytest.approx(middle, rel=0.1)
        assert batch["inputs"].shape == (100, config.sequence_length)
    if preset.recipe == "gpt":
        assert torch.equal(batch["inputs"][:, 1:], targets[:, :-1])
    if preset.recipe == "bert":
        positions = batch["positions"]
        assert torch.equal(batch["inputs"].gather(1, positions), targets)
        assert all(len(set(row)) == len(row) for row in positions.tolist())


def test_synthetic_samples_depend_on_the_seed() -> None:
    config = config_of(gpt.PRESET)
    one, two = (Synthetic(replace(config, seed=seed), 100) for seed in (0, 1))
    assert not torch.equal(fill(one, 7)["inputs"], fill(two, 7)["inputs"])


def test_synthetic_data_is_drawn_before_the_first_step_and_not_in_workers() -> None:
    config = config_of(gpt.PRESET)
    data = DataModule(config, load_source(config))
    trainer: Any = SimpleNamespace(global_rank=0, strategy=SimpleNamespace(root_device=CPU))
    data.trainer = trainer
    data.train_dataloader()
    assert isinstance(data.source.train, Synthetic)
    with OperatorCounter() as counter:
        assert len(data.source.train.draw(CPU)) == 2
    assert counter.names == []
    assert len(pickle.dumps(data.source.train)) < 10_000
