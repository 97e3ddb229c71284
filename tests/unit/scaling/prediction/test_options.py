"""Tests the options of `predict`, and the configurations that they describe."""

import pytest

from scaling.prediction.hardware import load_hardware
from scaling.prediction.options import build_configs, read_devices

NODE = load_hardware("h200-sxm-8")


def test_every_combination_is_a_config_on_whole_nodes() -> None:
    axes = {"size": ["124m", "6.7b"], "strategy": ["ddp", "fsdp"], "batch-size": ["1", "2", "4"]}
    configs, left_out = build_configs("gpt", (4, 64), axes, NODE)
    assert len(configs) == 2 * 2 * 3 * 2
    assert left_out == ()
    shapes = {(c.parallel.devices, c.parallel.num_nodes) for c in configs}
    assert shapes == {(4, 1), (8, 8)}
    assert {c.parallel.precision for c in configs} == {"bf16-mixed"}  # of GPUs


def test_a_shape_of_ones_own_is_given_as_to_the_recipe() -> None:
    axes = {"model.width": ["512"], "model.num-heads": ["8"], "sequence-length": ["32"]}
    (config,), _ = build_configs("gpt", (8,), axes, NODE)
    assert (config.model.width, config.model.num_heads) == (512, 8)
    assert config.sequence_length == 32
    assert config.parallel.strategy == "ddp"  # chosen: it fits


def test_combinations_that_do_not_work_are_left_out_with_the_reason() -> None:
    axes = {"strategy": ["fsdp", "zero3"], "precision": ["bf16-true"]}
    configs, left_out = build_configs("gpt", (8,), axes, NODE)
    assert [config.parallel.strategy for config in configs] == ["fsdp"]
    assert "bf16-true does not work with strategy zero3" in left_out[0]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"batch-size": ["0"]}, "batch_size is 0; it must be at least 1"),
        ({"size": ["6.8b"]}, "size '6.8b' is not known; did you mean 6.7b"),
        ({"strategy": ["fsdpp"]}, "strategy is 'fsdpp'; it must be one of auto, single, ddp"),
        ({"model.num-heads": ["7"]}, "width 768 does not divide into model.num_heads 7"),
        ({"batch-sice": ["1"]}, "--batch-sice.* is not an option; did you mean --batch-size"),
        ({"num-nodes": ["2"]}, "--num-nodes does not suit a prediction"),
        ({"strategy": ["zero3"], "precision": ["bf16-true"]}, "bf16-true does not work"),
    ],
)
def test_a_bad_option_is_one_line(axes: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        build_configs("gpt", (8,), axes, NODE)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12", "devices is 12, which does not divide into nodes of h200-sxm-8 .* 8 or 16"),
        ("3", "devices is 3, which does not divide a node .* choose 1, 2, 4, or a multiple of 8"),
        ("0", "devices is 0; it must be between 1 and 16,384"),
        ("16392", "must be between 1 and 16,384"),
        ("8,x", "devices is 'x'; it must be an integer"),
    ],
)
def test_devices_make_whole_nodes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_devices(text, NODE)
    assert read_devices("1,8,16384,8", NODE) == (1, 8, 16_384)
