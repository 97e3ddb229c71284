"""Tests the predicted memory of a rank, and the strategy that auto derives from it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipes import bert, gpt, vit
from recipes.presets import Preset
from unitransformer.config import DataConfig, ParallelConfig, Precision, RunConfig
from unitransformer.costs.flops import count_predicted_positions
from unitransformer.costs.memory import (
    activation_bytes,
    choose_strategy,
    rank_bytes,
    saved_bytes,
    state_bytes,
)
from unitransformer.data.sources import Synthetic
from unitransformer.objectives import Batch, Objective
from unitransformer.parallel.activation_checkpointing import checkpoint_activations
from unitransformer.transformer import Transformer

GIB = 2**30
HALF = {"precision": "16-mixed"}
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
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_predicted_bytes_equal_the_tensors_that_a_cpu_saves_for_the_backward_pass(
    dropout: float, preset: Preset
) -> None:
    config = make_config(preset, accelerator="cpu")
    config = replace(config, model=replace(config.model, dropout=dropout))
    assert measure_saved(config) == pytest.approx(saved_bytes(config), rel=0.03)


def measure_saved(config: RunConfig) -> int:
    """Returns the bytes that autograd saves, except weights and the batch."""
    objective = Objective(Transformer(config.model))
    order = torch.arange(config.batch_size)
    batch = Synthetic(config, 8).fill({"inputs": order, "targets": order}, torch.device("cpu"))
    given = {storage_of(tensor) for tensor in [*objective.parameters(), *tree_leaves(batch)]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in given:
            saved[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(batch)
    assert torch.isfinite(loss)
    return sum(saved.values())


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# Bytes that are kept on a GPU when the loss is known: inside autocast, with flash attention.
# A test below measures them again where torch is built for GPUs; these are of torch 2.14.1+cu130.
KEPT: list[tuple[Preset, str, int, dict[str, Any], int]] = [
    (gpt.PRESET, "124m", 8, {}, 4_656_066_352),
    (gpt.PRESET, "124m", 1, {}, 798_334_768),
    (gpt.PRESET, "124m", 8, {"activation_checkpointing": "full"}, 2_233_855_504),
    (gpt.PRESET, "124m", 8, {"activation_checkpointing": "selective"}, 3_748_523_824),
    (gpt.PRESET, "124m", 4, {"precision": "16-mixed"}, 2_451_648_304),
    (gpt.PRESET, "124m", 4, {"precision": "bf16-true"}, 2_047_131_952),
    (gpt.PRESET, "124m", 4, {"loss_chunk": 512}, 1_711_723_812),
    (gpt.PRESET, "124m", 4, {"pad_vocabulary": 128}, 2_452_490_544),
    (gpt.PRESET, "124m", 4, {"pad_vocabulary": 128, "loss_chunk": 512}, 1_712_069_412),
    (gpt.PRESET, "reference", 64, {}, 1_397_427_988),
    (bert.PRESET, "base", 16, {}, 3_271_864_868),
    (bert.PRESET, "base", 2, {"precision": "32-true"}, 628_730_688),
    (bert.PRESET, "base", 2, {"pad_vocabulary": 128, "precision": "32-true"}, 722_752_432),
    (bert.PRESET, "large", 8, {}, 4_695_455_620),
    (bert.PRESET, "base", 16, {"activation_checkpointing": "full"}, 677_815_172),
    (bert.PRESET, "base", 8, {"activation_checkpointing": "selective", **HALF}, 1_160_029_860),
    (bert.PRESET, "reference", 256, {}, 334_829_136),
    (vit.PRESET, "s", 64, {}, 2_064_605_952),
    (vit.PRESET, "l", 8, {}, 1_975_741_088),
    (vit.PRESET, "s", 16, {"precision": "16-mixed"}, 549_083_136),
    (vit.PRESET, "b", 32, {"activation_checkpointing": "full"}, 295_315_936),
    (vit.PRESET, "b", 32, {"activation_checkpointing": "selective"}, 1_383_529_216),
]


def gpu_config(preset: Preset, size: str, batch_size: int, options: dict[str, Any]) -> RunConfig:
    parallel = {"accelerator": "cuda", "strategy": "single", "precision": "bf16-mixed"} | options
    loss = {name: parallel.pop(name, 0) for name in ("loss_chunk", "pad_vocabulary")}
    return RunConfig(
        recipe=preset.recipe,
        size=size,
        model=preset.model_config(size),
        batch_size=batch_size,
        parallel=ParallelConfig(**parallel),
        **loss,
    )


def name_of(case: Any) -> str | None:
    return getattr(case, "recipe", None) or (
        " ".join(map(str, case.values())) if isinstance(case, dict) else None
    )


@pytest.mark.parametrize(("preset", "size", "batch_size", "options", "kept"), KEPT, ids=name_of)
def test_predicted_bytes_equal_those_that_a_gpu_keeps_for_the_backward_pass(
    preset: Preset, size: str, batch_size: int, options: dict[str, Any], kept: int
) -> None:
    config = gpu_config(preset, size, batch_size, options)
    assert saved_bytes(config) == pytest.approx(kept, rel=0.015)


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch for CPUs has no autograd of fake GPU tensors"
)
@pytest.mark.parametrize(("preset", "size", "batch_size", "options", "kept"), KEPT, ids=name_of)
def test_fake_gpu_tensors_keep_the_bytes_that_the_prediction_is_compared_with(
    preset: Preset, size: str, batch_size: int, options: dict[str, Any], kept: int
) -> None:
    config = gpu_config(preset, size, batch_size, options)
    assert measure_kept(config) == pytest.approx(kept, rel=0.001)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, is_causal: bool = False
) -> Tensor:
    """The kernel that a GPU chooses in 16 bits; a machine without a GPU would choose another."""
    assert attn_mask is None
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, is_causal=is_causal
    )[0]
    return attended


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operators have made, while something refers to them."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = {storage_of(tensor) for tensor in given}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in self.given:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def num_bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def measure_kept(config: RunConfig) -> int:
    """Returns the bytes that a forward pass on fake GPU tensors keeps, inside autocast."""
    precision = config.parallel.precision
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    with torch.device("meta"):
        network = Transformer(config.model)
    objective = Objective(network, loss_chunk=config.loss_chunk, num_logits=config.num_logits)
    checkpoint_activations(objective, config.parallel.activation_checkpointing)
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", flash_attention),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        FakeTensorMode(),
    ):
        move_to_gpu(objective, torch.bfloat16 if precision == "bf16-true" else torch.float32)
        batch = fake_batch(config)
        given = [*objective.parameters(), *objective.buffers(), *tree_leaves(batch)]
        enabled = precision in dtypes
        dtype = dtypes.get(precision, torch.bfloat16)
        with LiveStorages(given) as live, torch.autocast("cuda", dtype, enabled=enabled):
            loss = objective(batch)
            kept = live.num_bytes()
        assert loss.requires_grad
    return kept


def move_to_gpu(objective: Objective, dtype: torch.dtype) -> None:
    """Replaces parameters and buffers on the meta device; `to_empty` cannot do that for fakes."""
    made: dict[Tensor, Tensor] = {}
    for module in objective.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    if tensor not in made:
                        made[tensor] = torch.empty(tensor.shape, dtype=dtype, device="cuda")
                        if tensor.requires_grad:
                            made[tensor] = nn.Parameter(made[tensor])
                    table[name] = made[tensor]  # type: ignore[assignment]


def fake_batch(config: RunConfig) -> Batch:
    model, size = config.model, config.batch_size
    if model.image_size is not None:
        images = torch.empty(size, model.num_channels, model.image_size, model.image_size)
        dtype = torch.bfloat16 if config.parallel.precision == "bf16-true" else torch.float32
        labels = torch.zeros(size, dtype=torch.long, device="cuda")
        return {"inputs": images.to("cuda", dtype), "targets": labels}
    tokens = torch.zeros(size, config.sequence_length, dtype=torch.long, device="cuda")
    if config.recipe == "gpt":
        return {"inputs": tokens, "targets": tokens.clone()}
    predicted = tokens[:, : count_predicted_positions(config)]
    return {"inputs": tokens, "targets": predicted.clone(), "positions": predicted.clone()}


def test_selective_checkpointing_keeps_more_than_full_and_less_than_none() -> None:
    # Autograd's hooks do not see the tensors that selective checkpointing keeps.
    saved = [
        saved_bytes(make_config(activation_checkpointing=mode))
        for mode in ("full", "selective", "off")
    ]
    assert saved == sorted(saved)


def test_a_chunked_loss_never_holds_all_logits() -> None:
    config = make_config()
    chunked = replace(config, loss_chunk=64)
    rows = config.batch_size * config.sequence_length
    gradients = (1000 + rows) * 128 * 4  # of the head and of its input
    saved = activation_bytes(config) - activation_bytes(chunked)
    assert saved == (12 * rows - 4 * 64) * 1000 - gradients


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
    assert "sharded over 2 devices they may still not fit" in auto(4, devices=2)[1]


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
