"""Tests the predicted collectives against counted ones of two ranks, to the byte."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from recipes import bert, gpt, vit
from scaling.prediction import communication
from scaling.prediction.communication import Collective, collectives_of_step
from scaling.prediction.parameters import count_numbers, gradient_order
from unitransformer.config import ParallelConfig, RunConfig, Strategy
from unitransformer.costs.flops import count_parameters

PRESETS = {"bert": bert.PRESET, "gpt": gpt.PRESET, "vit": vit.PRESET}
SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "feedforward_width": 32, "dropout": 0.0}
SHAPES = {
    "bert": SMALL | {"num_classes": 50, "num_positions": 8},
    "gpt": SMALL | {"num_classes": 50, "num_positions": 8},
    "vit": SMALL | {"image_size": 16, "patch_size": 8},
}


def make_config(recipe: str, size: str = "reference", **parallel: object) -> RunConfig:
    preset = PRESETS[recipe]
    return RunConfig(
        recipe=preset.recipe,
        size=size,
        model=preset.model_config(size, **(SHAPES[recipe] if size == "reference" else {})),
        batch_size=4,
        parallel=ParallelConfig(**{"accelerator": "cpu", **parallel}),  # type: ignore[arg-type]
    )


def step(config: RunConfig) -> list[Collective]:
    """The collectives that a counter inside the trainer sees, so without callbacks."""
    found = collectives_of_step(config, node_size=8)
    return [collective for collective in found if collective.of != "agreement to stop"]


@pytest.mark.parametrize("recipe", PRESETS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp1", "hsdp", "zero1", "zero2", "zero3"])
def test_bytes_and_calls_equal_those_counted_in_a_run_of_two_ranks(
    recipe: str, strategy: Strategy, repository: Path
) -> None:
    folder = repository / "tests" / "benchmarks" / "baselines" / "torch-2.13-avx"
    counted = json.loads((folder / f"{recipe}-{strategy}.json").read_text())
    predicted = step(make_config(recipe, devices=2, strategy=strategy))
    sums = {"collective_bytes": Counter[str](), "collective_calls": Counter[str]()}
    for collective in predicted:
        sums["collective_bytes"][collective.kind] += collective.total_bytes
        sums["collective_calls"][collective.kind] += collective.calls
    for field, found in sums.items():
        seen = Counter[str]()
        for name, count in counted[field].items():
            seen[name.split(" in ")[0]] += count
        assert found == seen, field


@pytest.mark.parametrize("recipe", PRESETS)
def test_the_order_of_gradients_holds_every_parameter_once(recipe: str) -> None:
    for size in PRESETS[recipe].sizes:
        model = make_config(recipe, size).model
        assert count_numbers(gradient_order(model)) == count_parameters(model)


def test_fsdp_gathers_twice_per_layer_and_once_for_the_rest() -> None:
    config = make_config("gpt", "6.7b", devices=8, strategy="fsdp", precision="bf16-mixed")
    gathers = [c for c in step(config) if c.kind == "all_gather"]
    assert sum(c.calls for c in gathers) == 2 * 32 + 1
    # Weights travel in 2 bytes, gradients in 4.
    scatters = [c for c in step(config) if c.kind == "reduce_scatter"]
    assert sum(c.total_bytes - c.padding_bytes for c in scatters) == 4 * count_parameters(
        config.model
    )


def test_padding_is_itemized_and_grows_with_the_ranks() -> None:
    # A bias of 16 numbers over 64 ranks is padded to 64.
    few = step(make_config("gpt", devices=8, strategy="fsdp"))
    many = step(make_config("gpt", devices=8, num_nodes=8, strategy="fsdp"))
    padding = [sum(c.padding_bytes * c.calls for c in found) for found in (few, many)]
    assert 0 < padding[0] < padding[1]
    plain = [sum((c.bytes - c.padding_bytes) * c.calls for c in f) for f in (few, many)]
    assert plain[0] == plain[1]


def test_hybrid_sharding_reduces_shards_between_nodes_and_the_rest_within() -> None:
    config = make_config("gpt", devices=8, num_nodes=4, strategy="hsdp")
    groups = {(c.kind, c.group): (c.ranks, c.within_node) for c in step(config)}
    assert groups["all_gather", "shard"] == (8, True)
    assert groups["reduce_scatter", "shard"] == (8, True)
    assert groups["all_reduce", "replicate"] == (4, False)


def test_ddp_closes_its_first_bucket_at_one_mebibyte_and_the_others_at_25() -> None:
    config = make_config("gpt", "124m", devices=2, strategy="ddp")
    *full, last = (c.bytes for c in step(config))
    assert 2**20 <= full[0] < 25 * 2**20
    assert all(size >= 25 * 2**20 for size in full[1:])
    assert sum(full) + last == 4 * count_parameters(config.model)


def test_zero3_gathers_again_what_is_not_reused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("gpt", "6.7b", devices=8, strategy="zero3", precision="bf16-mixed")
    gathers = {(c.of, c.phase): c.calls for c in step(config) if c.phase != "optimizer"}
    assert gathers["layer", "forward"] == 32
    # A layer has 201 M numbers: the last four are still there in the backward pass.
    assert gathers["layer", "backward"] == 28
    monkeypatch.setattr(communication, "REUSE_NUMBERS", 10**11)
    # Not the cached answer, which depends on the model and the config.
    again = replace(config, model=replace(config.model, dropout=0.1))
    gathers = {(c.of, c.phase): c.calls for c in step(again) if c.phase != "optimizer"}
    assert ("layer", "backward") not in gathers


def test_one_device_sends_nothing_and_several_agree_when_to_stop() -> None:
    assert collectives_of_step(make_config("gpt", strategy="single"), node_size=8) == ()
    *_, last = collectives_of_step(make_config("gpt", devices=2, strategy="ddp"), node_size=8)
    assert (last.of, last.bytes, last.calls) == ("agreement to stop", 4, 1)
