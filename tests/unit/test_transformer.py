"""Tests that the network equals the plain PyTorch model and starts at a uniform guess."""

import math
import time

import pytest
import torch

from recipes import bert, gpt, vit
from recipes.presets import Preset
from tests.builders.plain_model import PlainTransformer
from unitransformer.config import ModelConfig, RunConfig
from unitransformer.costs.flops import count_flops, count_parameters
from unitransformer.objectives import Batch, Objective
from unitransformer.record.parameter_summary import render_summary, summarize
from unitransformer.transformer import PatchEncoding, Transformer

PRESETS = (bert.PRESET, gpt.PRESET, vit.PRESET)
EVERY_SIZE = [(preset, size) for preset in PRESETS for size in preset.sizes]
TINY = {"width": 16, "num_layers": 2, "num_heads": 4, "feedforward_width": 32}


def inputs_of(config: ModelConfig, batch: int = 3, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if config.image_size is not None:
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        return torch.randn(shape, generator=generator)
    shape = (batch, min(64, config.num_positions))
    return torch.randint(config.num_classes, shape, generator=generator)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.recipe)
def test_a_plain_models_state_loads_strictly_and_gives_its_outputs(preset: Preset) -> None:
    overrides = {"causal": False} if preset.recipe == "gpt" else {}
    config = preset.model_config("reference", **overrides)
    torch.manual_seed(0)
    plain = PlainTransformer(config).eval()
    ours = Transformer(config).eval()
    ours.load_state_dict(plain.state_dict(), strict=True)
    inputs = inputs_of(config)
    torch.testing.assert_close(ours(inputs), plain(inputs), atol=1e-5, rtol=0)
    # Without gradients `nn.MultiheadAttention` takes another path, which alone changes the plain
    # model's logits, here as large as 80, by up to 1.5e-5.
    with torch.no_grad():
        ours_out, plain_out = ours(inputs), plain(inputs)
    torch.testing.assert_close(ours_out, plain_out, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours_out.softmax(-1), plain_out.softmax(-1), atol=1e-5, rtol=0)


def test_state_dicts_load_strictly_into_the_plain_model() -> None:
    config = bert.model_config(**TINY)
    PlainTransformer(config).load_state_dict(Transformer(config).state_dict(), strict=True)


def test_parameters_have_the_names_and_layouts_of_the_plain_model() -> None:
    with torch.device("meta"):
        text = Transformer(gpt.model_config()).state_dict()
        images = Transformer(vit.model_config()).state_dict()
    assert text["embedding.lut.weight"].shape == (30_522, 768)
    assert text["pe.pe"].shape == (1, 64, 768)
    assert text["transformer_layers.5.mha.in_proj_weight"].shape == (3 * 768, 768)
    assert text["transformer_layers.5.feedforward.fcn.3.weight"].shape == (768, 3072)
    assert images["class_embedding"].shape == (1, 1, 768)
    assert images["linear_mapper.weight"].shape == (768, 768)
    assert images["pe.pe"].shape == (1, 197, 768)


def test_logits_have_one_row_per_position_or_per_image() -> None:
    gpt_network = Transformer(gpt.model_config(**TINY, num_classes=50))
    vit_network = Transformer(vit.model_config(**TINY, image_size=32, patch_size=8))
    assert gpt_network(torch.zeros(2, 7, dtype=torch.long)).shape == (2, 7, 50)
    assert vit_network(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_patches_equal_those_of_unfold() -> None:
    images = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    expected = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    assert torch.equal(PatchEncoding(4)(images), expected)


def test_gpt_is_causal_and_the_mask_can_be_disabled() -> None:
    config = gpt.model_config(**TINY, num_classes=50)
    tokens = torch.randint(50, (1, 10))
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % 50
    blind, seeing = Transformer(config), Transformer(gpt.model_config(**TINY, causal=False))
    blind.eval(), seeing.eval()
    assert torch.equal(blind(tokens)[:, :9], blind(changed)[:, :9])
    assert not torch.equal(seeing(tokens)[:, :9], seeing(changed)[:, :9])


@pytest.mark.parametrize("causal", [True, False])
def test_chosen_positions_have_the_logits_and_gradients_they_have_among_all(causal: bool) -> None:
    config = gpt.model_config(**TINY, num_classes=50, causal=causal, dropout=0.0)
    network = Transformer(config)
    tokens, positions = torch.randint(50, (3, 12)), torch.tensor([[0, 5], [11, 3], [7, 7]])
    some = network(tokens, positions)
    some.square().sum().backward()
    gradient = network.transformer_layers[0].mha.in_proj_weight.grad.clone()
    network.zero_grad()
    every = network(tokens).gather(1, positions.unsqueeze(-1).expand(-1, -1, 50))
    every.square().sum().backward()
    torch.testing.assert_close(some, every)
    torch.testing.assert_close(network.transformer_layers[0].mha.in_proj_weight.grad, gradient)


def test_weights_are_a_function_of_config_and_seed_alone() -> None:
    config = gpt.model_config(**TINY, num_classes=50)
    first = Transformer(config, seed=1).state_dict()
    torch.manual_seed(99)
    again, other = Transformer(config, seed=1), Transformer(config, seed=2)
    assert all(torch.equal(first[name], value) for name, value in again.state_dict().items())
    assert not torch.equal(first["lm_head.weight"], other.state_dict()["lm_head.weight"])


def test_residual_branches_start_smaller_in_deeper_networks() -> None:
    spreads = []
    for num_layers in (2, 8):
        network = Transformer(gpt.model_config(width=64, num_heads=4, num_layers=num_layers))
        layer = network.transformer_layers[0]
        spreads.append((layer.mha.out_proj.weight.std(), layer.feedforward.fcn[3].weight.std()))
    for shallow, deep in zip(*spreads, strict=True):
        assert (shallow / deep).item() == pytest.approx(2.0, rel=0.05)


def test_attention_goes_through_scaled_dot_product_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: object, **options: object) -> torch.Tensor:
        seen.append(options)
        return original(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    Transformer(gpt.model_config(**TINY, num_classes=50))(torch.zeros(1, 5, dtype=torch.long))
    assert [options["is_causal"] for options in seen] == [True, True]


def test_a_model_of_175_billion_parameters_is_described_quickly_without_memory() -> None:
    config = gpt.model_config("175b")
    start = time.process_time()
    with torch.device("meta"):
        text = render_summary(summarize(Transformer(config)))
    run = RunConfig(recipe="gpt", size="175b", model=config)
    assert "174 B" in text
    assert count_flops(run)["6n"] == 6 * count_parameters(config)
    # 0.3 s on an idle machine; CPU seconds, so that other load does not matter.
    assert time.process_time() - start < 2


def first_loss(config: ModelConfig) -> float:
    torch.set_flush_denormal(True)
    objective = Objective(Transformer(config)).eval()
    inputs = inputs_of(config, batch=4)
    shape = (4,) if config.reads_images else tuple(inputs.shape)
    targets = torch.randint(config.num_classes, shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(objective(Batch(inputs=inputs, targets=targets)))


@pytest.mark.parametrize(
    ("preset", "size"), EVERY_SIZE, ids=[f"{preset.recipe}-{size}" for preset, size in EVERY_SIZE]
)
def test_the_first_loss_of_every_size_is_within_3_percent_of_a_uniform_guess(
    preset: Preset, size: str
) -> None:
    full = preset.model_config(size)
    # The width of the size, except for the three widest; few layers, to fit a laptop.
    # Residual branches shrink with depth, so fewer layers are the harder case.
    small = {"num_layers": min(2, full.num_layers)}
    if full.width > 2000 and not full.reads_images:
        small["num_classes"] = 4000
    if full.width > 4000:
        small |= {"width": 1280, "num_heads": 10, "feedforward_width": 1280}
    config = preset.model_config(size, **small)
    assert first_loss(config) == pytest.approx(math.log(config.num_classes), rel=0.03)


@pytest.mark.parametrize(
    ("preset", "size"), EVERY_SIZE, ids=[f"{preset.recipe}-{size}" for preset, size in EVERY_SIZE]
)
def test_computed_parameter_counts_equal_those_of_the_network(preset: Preset, size: str) -> None:
    config = preset.model_config(size)
    with torch.device("meta"):
        network = Transformer(config)
    assert count_parameters(config) == sum(p.numel() for p in network.parameters())
    assert all(p.device.type == "meta" for p in network.parameters())


@pytest.mark.parametrize(
    ("preset", "size", "millions"),
    [
        # Published counts: GPT-2's and BERT's learned positions, segments and pooler, and ViT's
        # learned positions, are not part of this backbone; they make up the difference.
        (gpt.PRESET, "124m", 124.4),
        (gpt.PRESET, "350m", 354.8),
        (gpt.PRESET, "774m", 774.0),
        (gpt.PRESET, "1.5b", 1557.6),
        (gpt.PRESET, "175b", 174_600),
        (bert.PRESET, "base", 110),
        (bert.PRESET, "large", 336),
        (vit.PRESET, "b16", 86.6),
        (vit.PRESET, "l16", 304.3),
        (vit.PRESET, "h14", 632.0),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(
    preset: Preset, size: str, millions: float
) -> None:
    assert count_parameters(preset.model_config(size)) / 1e6 == pytest.approx(millions, rel=0.015)


def test_a_shared_matrix_stays_shared_when_materialized() -> None:
    with torch.device("meta"):
        network = Transformer(gpt.model_config(**TINY, tied_head=True))
    parent = torch.nn.Sequential(network).to_empty(device="cpu").double()
    assert parent[0].lm_head.weight is parent[0].embedding.lut.weight
    assert parent[0].lm_head.weight.dtype is torch.float64
