"""Computed FLOPs equal those of torch's counter exactly."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from recipes import bert, gpt, vit
from recipes.presets import Preset
from unitransformer.config import ActivationCheckpointing, DataConfig, ParallelConfig, RunConfig
from unitransformer.costs.flops import (
    CONVENTIONS,
    count_flops,
    count_parameters,
    count_predicted_positions,
    flops_per_sample,
    recomputed_flops_per_sample,
)
from unitransformer.objectives import Batch, Objective
from unitransformer.parallel.activation_checkpointing import checkpoint_activations
from unitransformer.transformer import Transformer

SHAPES = {
    "flat": {"width": 32, "num_layers": 1, "num_heads": 4, "feedforward_width": 48},
    "odd": {"width": 48, "num_layers": 3, "num_heads": 3, "feedforward_width": 192},
    "wide": {"width": 64, "num_layers": 2, "num_heads": 8, "feedforward_width": 100},
    "deep": {"width": 16, "num_layers": 5, "num_heads": 1, "feedforward_width": 7},
    "thin": {"width": 20, "num_layers": 4, "num_heads": 10, "feedforward_width": 333},
    "square": {"width": 96, "num_layers": 2, "num_heads": 6, "feedforward_width": 96},
}
MODELS: list[tuple[Preset, dict[str, object]]] = [
    (gpt.PRESET, {}),
    (gpt.PRESET, {"num_classes": 77, "sequence_length": 13}),
    (gpt.PRESET, {"tied_head": True, "head_bias": False, "final_norm": True}),
    (bert.PRESET, {}),
    (bert.PRESET, {"sequence_length": 7, "activation": "gelu"}),
    (bert.PRESET, {"tied_head": True, "dropout": 0.0, "sequence_length": 19}),
    (vit.PRESET, {}),
    (vit.PRESET, {"image_size": 32, "patch_size": 8, "num_channels": 1, "num_classes": 10}),
]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
EVERY_MODEL = pytest.mark.parametrize(
    ("preset", "overrides"),
    MODELS,
    ids=lambda value: value.recipe if isinstance(value, Preset) else "-".join(value) or "reference",
)


def run_config(preset: Preset, **overrides: Any) -> RunConfig:
    length = overrides.pop("sequence_length", None)
    checkpointing = overrides.pop("activation_checkpointing", "off")
    return RunConfig(
        recipe=preset.recipe,
        size="reference",
        model=preset.model_config("reference", **overrides),
        data=DataConfig(sequence_length=length),
        parallel=ParallelConfig(activation_checkpointing=checkpointing),
    )


def make_batch(config: RunConfig, batch_size: int) -> Batch:
    model = config.model
    if model.image_size is not None:
        shape = (batch_size, model.num_channels, model.image_size, model.image_size)
        return Batch(inputs=torch.randn(shape), targets=torch.zeros(batch_size, dtype=torch.long))
    tokens = torch.zeros(batch_size, config.sequence_length, dtype=torch.long)
    if config.recipe == "gpt":
        return Batch(inputs=tokens, targets=tokens)
    targets = tokens[:, : count_predicted_positions(config)]
    return Batch(inputs=tokens, targets=targets, positions=targets)


def counted_by_torch(config: RunConfig, batch_size: int, *, device: str = "meta") -> int:
    """Counted FLOPs of a step on the meta device, where attention counts as matrix products."""
    with torch.device(device):
        objective = Objective(
            Transformer(config.model), loss_chunk=config.loss_chunk, num_logits=config.num_logits
        )
        checkpoint_activations(objective, config.parallel.activation_checkpointing)
        with FlopCounterMode(display=False) as counter:
            objective(make_batch(config, batch_size)).backward()
    return counter.get_total_flops()


@EVERY_SHAPE
@EVERY_MODEL
def test_matmul_flops_equal_torchs_counter(
    preset: Preset, overrides: dict[str, Any], shape: dict[str, Any]
) -> None:
    config = run_config(preset, **overrides, **shape)
    counted = counted_by_torch(config, batch_size=3)
    assert counted == 3 * flops_per_sample(config, causal=False)


@pytest.mark.parametrize("checkpointing", get_args(ActivationCheckpointing))
@pytest.mark.parametrize("shape", [SHAPES["flat"], SHAPES["odd"]], ids=["flat", "odd"])
@EVERY_MODEL
def test_hardware_flops_with_recomputation_equal_torchs_counter(
    preset: Preset, overrides: dict[str, Any], shape: dict[str, Any], checkpointing: str
) -> None:
    config = run_config(preset, **overrides, **shape, activation_checkpointing=checkpointing)
    again = recomputed_flops_per_sample(config)
    assert counted_by_torch(config, 2) == 2 * (flops_per_sample(config, causal=False) + again)
    assert (again > 0) == (checkpointing == "full")


@pytest.mark.parametrize("loss_chunk", [0, 5])
@pytest.mark.parametrize("preset", [gpt.PRESET, bert.PRESET], ids=lambda p: p.recipe)
def test_only_hardware_flops_count_the_padding_of_the_vocabulary(
    preset: Preset, loss_chunk: int
) -> None:
    plain = replace(run_config(preset, **SHAPES["odd"]), loss_chunk=loss_chunk)
    padded = replace(plain, pad_vocabulary=128)
    units = plain.tokens_per_sample
    assert padded.num_logits % 128 == 0
    assert padded.num_logits > plain.model.num_classes
    assert counted_by_torch(padded, 1) == pytest.approx(units * count_flops(padded)["hardware"])
    names = [
        name for name, count in count_flops(padded).items() if count != count_flops(plain)[name]
    ]
    assert names == ["hardware"]


@pytest.mark.parametrize("preset", [gpt.PRESET, bert.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_the_flops_of_the_largest_size_equal_torchs_counter(preset: Preset) -> None:
    # With two of its layers: all are alike, and the shapes above have up to five.
    model = preset.model_config(list(preset.sizes)[-1], num_layers=2)
    config = replace(run_config(preset, activation_checkpointing="full"), model=model)
    again = recomputed_flops_per_sample(config)
    assert counted_by_torch(config, 1) == flops_per_sample(config, causal=False) + again


def counted_in_graphs(config: RunConfig) -> int:
    """FLOPs of a compiled step from its graphs: a counter around it would disable compilation.

    Attention is not counted, as on any CPU.
    """
    counts = []

    def count_each(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        def value(argument: Any) -> Any:
            return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument

        for node in graph.graph.nodes:
            count = flop_registry.get(getattr(node.target, "overloadpacket", None))
            if count is not None:
                counts.append(count(*map(value, node.args), out_val=node.meta["val"]))
        return make_boxed_func(graph)  # type: ignore[no-any-return]

    objective = Objective(Transformer(config.model), loss_chunk=config.loss_chunk)
    checkpoint_activations(objective, config.parallel.activation_checkpointing)
    torch.compiler.reset()
    backend = aot_autograd(
        fw_compiler=count_each,
        bw_compiler=count_each,
        partition_fn=min_cut_rematerialization_partition,
    )
    parts = objective.network.transformer_layers if config.parallel.is_sharded else [objective]
    for part in parts:
        part.compile(backend=backend)
    objective(make_batch(config, 1)).backward()
    return sum(counts)


# Dynamo warns when it traces a custom autograd function.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.compiles
@pytest.mark.parametrize(
    ("preset", "spread", "final_norm", "loss_chunk", "repeats_the_last_product"),
    [
        (gpt.PRESET, {}, False, 0, True),
        (bert.PRESET, {}, True, 0, True),
        (vit.PRESET, {}, False, 0, True),
        (gpt.PRESET, {}, False, 50, True),  # chunks, the last of which is shorter
        (gpt.PRESET, {}, True, 50, True),
        (gpt.PRESET, {"strategy": "fsdp"}, False, 0, False),
        (gpt.PRESET, {"activation_checkpointing": "selective"}, False, 0, False),
    ],
    ids=["gpt", "bert", "vit", "chunks", "norm-chunks", "by-layer", "selective"],
)
def test_a_compiled_step_recomputes_the_result_of_the_last_layer(
    preset: Preset,
    spread: dict[str, Any],
    final_norm: bool,
    loss_chunk: int,
    repeats_the_last_product: bool,
) -> None:
    config = run_config(preset, **SHAPES["wide"], final_norm=final_norm, dropout=0.0)
    spread = {"activation_checkpointing": "full", "compile": "default"} | spread
    config = replace(config, parallel=ParallelConfig(**spread), loss_chunk=loss_chunk)
    last_product = repeats_the_last_product * 2 * count_predicted_positions(config) * 64 * 100
    seen = counted_by_torch(config, 1, device="cpu")  # eager
    head = 3 * 2 * count_predicted_positions(config) * 64 * config.model.num_classes
    outside = head if config.parallel.is_sharded else 0  # only the layers are compiled
    assert counted_in_graphs(config) == seen + last_product - outside
    eager = replace(config, parallel=replace(config.parallel, compile="off"))
    more = recomputed_flops_per_sample(config) - recomputed_flops_per_sample(eager)
    assert more == last_product


@pytest.mark.parametrize("loss_chunk", [1, 5, 1000])
@pytest.mark.parametrize("preset", [gpt.PRESET, bert.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_a_loss_in_chunks_computes_no_logits_twice(preset: Preset, loss_chunk: int) -> None:
    config = replace(run_config(preset, **SHAPES["wide"]), loss_chunk=loss_chunk)
    assert counted_by_torch(config, 2) == 2 * flops_per_sample(config, causal=False)


@pytest.mark.parametrize("preset", [gpt.PRESET, bert.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_flops_per_token_do_not_depend_on_batch_or_devices(preset: Preset) -> None:
    config = run_config(preset)
    spread = ParallelConfig(devices=8, strategy="ddp", precision="bf16-mixed")
    other = replace(config, batch_size=5, accumulate=7, loss_chunk=16, parallel=spread)
    assert count_flops(other) == count_flops(config)


def test_full_checkpointing_recomputes_a_layer_without_its_last_product() -> None:
    shape = {"width": 8, "num_layers": 1, "num_heads": 1, "feedforward_width": 32}
    config = run_config(
        gpt.PRESET, **shape, sequence_length=4, activation_checkpointing="full", num_classes=5
    )
    projections, attention, first_product = 4 * 2 * 8 * 8, 2 * 2 * 4 * 8, 2 * 8 * 32
    assert recomputed_flops_per_sample(config) == 4 * (projections + attention + first_product)
    counts = count_flops(config)
    assert counts["hardware"] == counts["matmul"] + projections + attention + first_product


def test_torchs_counter_sees_no_attention_on_a_cpu() -> None:
    """torch counts no attention on a CPU, hence the meta device above.

    https://github.com/pytorch/pytorch/issues/195460
    """
    config = run_config(gpt.PRESET, **SHAPES["wide"], sequence_length=16, dropout=0.0)
    layers, products, twice_again = 2, 2, 3
    attention = twice_again * layers * products * 2 * 16 * 16 * 64
    seen = counted_by_torch(config, 1, device="cpu")
    assert flops_per_sample(config, causal=False) - seen == attention


def test_torchs_counter_sees_flash_attention_as_three_and_a_half_forward_passes() -> None:
    """The backward kernel recomputes the scores: five products where the model needs four."""
    with torch.device("meta"):
        q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0].sum().backward()
    forward = 2 * (2 * 2 * 16 * 16 * 8)
    assert counter.get_total_flops() == 3.5 * forward
    with FlopCounterMode(display=False) as counter:
        functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_every_flop_count_has_a_described_convention() -> None:
    assert count_flops(run_config(vit.PRESET)).keys() == CONVENTIONS.keys()


def test_a_causal_mask_leaves_a_little_more_than_half_of_attention() -> None:
    config = run_config(gpt.PRESET, **SHAPES["flat"], sequence_length=63)
    saved = flops_per_sample(config, causal=False) - flops_per_sample(config, causal=True)
    attention = 3 * 2 * 2 * 63 * 63 * 32
    assert saved == attention * (1 - 32 / 63)


def test_conventions_without_attention_differ_by_twelve_layers_width_positions() -> None:
    config = run_config(gpt.PRESET)
    counts = count_flops(config)
    assert counts["6n"] == 6 * count_parameters(config.model)
    assert counts["palm"] - counts["6n"] == 12 * 6 * 768 * 64


def test_an_image_counts_all_its_positions() -> None:
    config = run_config(vit.PRESET)
    assert count_flops(config)["6n"] == 6 * count_parameters(config.model) * 197


def test_masked_tokens_are_predicted_at_three_of_twenty_positions() -> None:
    assert count_predicted_positions(run_config(bert.PRESET)) == 3
