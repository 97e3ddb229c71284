"""FLOPs by arithmetic equal torch's own counter, to the last digit."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recipes import bert, gpt, vit
from recipes.presets import Preset
from unitransformer.config import DataConfig, RunConfig
from unitransformer.flops import count_flops, count_looked_at, count_parameters, flops_per_sample
from unitransformer.objectives import Batch, Objective
from unitransformer.transformer import Transformer

SHAPES = [
    {"width": 32, "num_layers": 1, "num_heads": 4, "feedforward_width": 48},
    {"width": 48, "num_layers": 3, "num_heads": 3, "feedforward_width": 192},
    {"width": 64, "num_layers": 2, "num_heads": 8, "feedforward_width": 100},
]


def run_config(preset: Preset, **overrides: object) -> RunConfig:
    length = overrides.pop("sequence_length", None)
    return RunConfig(
        recipe=preset.recipe,
        size="reference",
        model=preset.model_config("reference", **overrides),
        data=DataConfig(sequence_length=length),  # type: ignore[arg-type]
    )


def counted_by_torch(config: RunConfig, batch_size: int) -> int:
    """A step on the meta device, where attention is counted as its two matrix products.

    On a CPU the counter sees no FLOPs in the fused attention at all, and CUDA's flash attention
    counts 3.5 forwards for its recomputation; neither is what a model needs.
    """
    model = config.model
    with torch.device("meta"):
        objective = Objective(Transformer(model))
        if model.image_size is not None:
            shape = (batch_size, model.num_channels, model.image_size, model.image_size)
            batch = Batch(
                inputs=torch.randn(shape), targets=torch.zeros(batch_size, dtype=torch.long)
            )
        else:
            words = torch.zeros(batch_size, config.sequence_length, dtype=torch.long)
            batch = Batch(inputs=words, targets=words)
            if config.recipe == "bert":
                asked = words[:, : count_looked_at(config)]
                batch = Batch(inputs=words, targets=asked, positions=asked)
        with FlopCounterMode(display=False) as counter:
            objective(batch).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES, ids=["flat", "odd", "wide"])
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        (gpt.PRESET, {}),
        (gpt.PRESET, {"num_classes": 77, "sequence_length": 13}),
        (gpt.PRESET, {"tied_head": True, "head_bias": False, "final_norm": True}),
        (bert.PRESET, {}),
        (bert.PRESET, {"sequence_length": 7, "activation": "gelu"}),
        (vit.PRESET, {}),
        (vit.PRESET, {"image_size": 32, "patch_size": 8, "num_channels": 1, "num_classes": 10}),
    ],
    ids=lambda value: value.recipe if isinstance(value, Preset) else "-".join(value) or "reference",
)
def test_matmul_flops_equal_torchs_counter(
    preset: Preset, overrides: dict[str, object], shape: dict[str, int]
) -> None:
    config = run_config(preset, **overrides, **shape)
    counted = counted_by_torch(config, batch_size=3)
    assert counted == 3 * flops_per_sample(config, causal=False)


def test_a_causal_mask_leaves_a_little_more_than_half_of_attention() -> None:
    config = run_config(gpt.PRESET, **SHAPES[0], sequence_length=63)
    saved = flops_per_sample(config, causal=False) - flops_per_sample(config, causal=True)
    attention = 3 * 2 * 2 * 63 * 63 * 32
    assert saved == attention * (1 - 32 / 63)


def test_conventions_without_attention_differ_by_twelve_layers_width_positions() -> None:
    config = run_config(gpt.PRESET)
    counts = count_flops(config)
    assert counts["6n"] == 6 * count_parameters(config.model)
    assert counts["palm"] - counts["6n"] == 12 * 6 * 768 * 64


def test_a_picture_counts_all_its_positions() -> None:
    config = run_config(vit.PRESET)
    assert count_flops(config)["6n"] == 6 * count_parameters(config.model) * 197


def test_a_masked_word_is_looked_for_at_three_of_twenty_positions() -> None:
    assert count_looked_at(run_config(bert.PRESET)) == 3
