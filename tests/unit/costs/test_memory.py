"""Tests the predicted memory of a rank, and the strategy that auto derives from it."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from recipes import bert, gpt, vit
from recipes.presets import Preset
from unitransformer.config import DataConfig, ParallelConfig, Precision, RunConfig
from unitransformer.costs.memory import (
    activation_bytes,
    choose_strategy,
    layer_activation_bytes,
    rank_bytes,
    state_bytes,
)
from unitransformer.data.sources import Synthetic
from unitransformer.objectives import Objective
from unitransformer.parallel.activation_checkpointing import checkpoint_activations
from unitransformer.transformer import Transformer

GIB = 2**30
SHAPE = {"width": 128, "num_layers": 6, "num_heads": 4, "feedforward_width": 512, "dropout": 0.0}


def make_config(preset: Preset = gpt.PRESET, **parallel: object) -> RunConfig:
    shape = SHAPE if preset is vit.PRESET else SHAPE | {"num_classes": 1000}
    return RunConfig(
        recipe=preset.recipe,
        size="reference",
        model=preset.model_config("reference", **shape),
        data=DataConfig(source="synthetic"),
        parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
    )


def auto(memory_gib: float | None, **parallel: object) -> tuple[str, str]:
    """The strategy that auto selects for a model with 16 GB of state, and why."""
    model = gpt.model_config("1.3b", num_layers=18)
    config = replace(make_config(**parallel), model=model, batch_size=1)
    assert state_bytes(config) == pytest.approx(15 * GIB, rel=0.05)
    memory = None if memory_gib is None else int(memory_gib * GIB)
    chosen, why = choose_strategy(config, memory)
    return chosen.parallel.strategy, why


def test_a_parameter_costs_sixteen_bytes_and_in_pure_bf16_eight() -> None:
    full, half = make_config(), make_config(precision="bf16-true")
    assert state_bytes(full) == 2 * state_bytes(half)
    assert state_bytes(full) % 16 == 0


@pytest.mark.parametrize(
    ("strategy", "quarters"),
    [("ddp", 4), ("zero1", 3), ("zero2", 2.5), ("zero3", 2), ("fsdp", 2), ("fsdp1", 2)],
)
def test_two_ranks_divide_what_the_strategy_divides(strategy: str, quarters: float) -> None:
    config = make_config(devices=2, strategy=strategy)
    state = rank_bytes(config) - activation_bytes(config)
    assert state == pytest.approx(quarters / 4 * state_bytes(config), rel=1e-6)


@pytest.mark.parametrize("preset", [bert.PRESET, gpt.PRESET, vit.PRESET], ids=lambda p: p.recipe)
@pytest.mark.parametrize("mode", ["off", "full"])
def test_predicted_activations_equal_the_tensors_saved_for_backward(
    mode: str, preset: Preset
) -> None:
    config = make_config(preset, activation_checkpointing=mode)
    saved = measure_saved(config)
    assert sum(saved) == pytest.approx(layer_activation_bytes(config), rel=0.25)


def measure_saved(config: RunConfig) -> list[int]:
    """Bytes of each tensor that autograd saves, except weights and logits."""
    objective = Objective(Transformer(config.model))
    checkpoint_activations(objective, config.parallel.activation_checkpointing)
    order = torch.arange(config.batch_size)
    batch = Synthetic(config, 8).fill({"inputs": order, "targets": order}, torch.device("cpu"))
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_logits = tensor.shape[-1:] == (config.model.num_classes,)
        if storage.data_ptr() not in weights and not is_logits:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(batch)
    assert torch.isfinite(loss)
    return list(saved.values())


def test_selective_checkpointing_keeps_more_than_full_and_less_than_none() -> None:
    # Autograd's hooks do not see the tensors that selective checkpointing keeps.
    saved = [
        layer_activation_bytes(make_config(activation_checkpointing=mode))
        for mode in ("full", "selective", "off")
    ]
    assert saved == sorted(saved)


def test_a_chunked_loss_never_holds_all_logits() -> None:
    config = make_config()
    chunked = replace(config, loss_chunk=64)
    rows = config.batch_size * config.sequence_length
    saved = activation_bytes(config) - activation_bytes(chunked)
    assert saved == (rows - 64) * 1000 * 12


def test_auto_selects_single_on_one_device() -> None:
    assert auto(8)[0] == "single"


def test_auto_replicates_a_model_that_fits_on_every_device() -> None:
    strategy, why = auto(80, devices=8)
    assert strategy == "ddp"
    assert "fit in the 80 GiB per device" in why


def test_auto_shards_a_model_that_does_not_fit() -> None:
    strategy, why = auto(16, devices=8)
    assert strategy == "fsdp"
    assert "do not fit in the 16 GiB per device" in why
    assert "sharded over 8 devices they do" in why


def test_auto_shards_within_a_node_and_replicates_between_nodes_if_that_fits() -> None:
    assert auto(16, devices=8, num_nodes=2)[0] == "hsdp"
    assert auto(4, devices=2, num_nodes=8)[0] == "fsdp"


def test_auto_reports_a_model_that_fits_with_no_strategy() -> None:
    assert "sharded over 2 devices they may not either" in auto(4, devices=2)[1]


def test_auto_reports_that_memory_is_unknown() -> None:
    strategy, why = auto(None, devices=8)
    assert strategy == "ddp"
    assert "the memory of a device is unknown" in why


def test_a_given_strategy_is_kept() -> None:
    assert auto(4, devices=2, strategy="ddp") == ("ddp", "as configured")


@pytest.mark.parametrize("shape", [{"devices": 8}, {"devices": 8, "num_nodes": 2}])
def test_auto_shards_float16_with_the_strategy_that_scales_losses(shape: dict[str, int]) -> None:
    assert auto(80, precision="16-mixed", **shape)[0] == "ddp"
    strategy, why = auto(16, precision="16-mixed", **shape)
    assert strategy == "fsdp1"
    assert f"sharded over {8 * shape.get('num_nodes', 1)} devices they do; fsdp1, as" in why


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("precision", "strategy"), [("32-true", "fsdp"), ("16-mixed", "fsdp1")])
def test_auto_offloads_with_a_strategy_that_supports_it(
    precision: str, strategy: str, devices: int
) -> None:
    chosen, why = auto(80, devices=devices, precision=precision, cpu_offload=True)
    assert chosen == strategy
    assert "in host memory; single and ddp keep it" in why


@pytest.mark.parametrize("memory_mib", [None, 1, 500, 10_000])
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_the_chosen_strategy_is_always_a_valid_config(
    num_nodes: int, offload: bool, precision: str, memory_mib: int | None
) -> None:
    config = make_config(devices=4, num_nodes=num_nodes, precision=precision, cpu_offload=offload)
    chosen, _ = choose_strategy(config, memory_mib and memory_mib * 2**20)
    assert chosen.parallel.strategy != "auto"
