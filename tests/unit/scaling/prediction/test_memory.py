"""Tests what must hold for every predicted memory; tests/benchmarks compares with real runs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from recipes import gpt, vit
from scaling.prediction.hardware import load_hardware
from scaling.prediction.memory import NUM_DIGITS, Memory, predict_memory
from scaling.prediction.parameters import count_numbers, outer_parameters
from tests.builders.predictions import check_memory, random_configs
from unitransformer.config import ParallelConfig, RunConfig, Strategy
from unitransformer.costs.flops import count_parameters
from unitransformer.costs.memory import saved_by_kind, saved_bytes
from unitransformer.data.sources import DIGITS

NODE = load_hardware("h100-sxm-8")


def make_config(size: str = "1.3b", batch_size: int = 1, **parallel: object) -> RunConfig:
    options = {"accelerator": "cuda", "precision": "bf16-mixed", **parallel}
    return RunConfig(
        recipe="gpt",
        size=size,
        model=gpt.PRESET.model_config(size),
        batch_size=batch_size,
        parallel=ParallelConfig(**options),  # type: ignore[arg-type]
    )


def predict(config: RunConfig) -> Memory:
    return predict_memory(config, NODE)


def test_the_samples_that_built_in_and_synthetic_images_hold_are_counted() -> None:
    model = vit.PRESET.model_config("reference")
    config = replace(make_config(strategy="single"), recipe="vit", size="reference", model=model)
    held = {
        source: predict(replace(config, data=replace(config.data, source=source))).inputs
        for source in ("builtin", "synthetic")
    }

    with np.load(DIGITS) as stored:
        assert np.bincount(stored["labels"]).tolist() == list(NUM_DIGITS)
    digits = sum(NUM_DIGITS[:3]) * (8 * 8 * 4 + 8)  # three classes
    numbers = 2**18 * (4 + 8) + 3 * 224 * 224 * 4
    assert held["synthetic"] - held["builtin"] == numbers - digits


def test_the_states_of_ddp_are_sixteen_bytes_a_parameter() -> None:
    config = make_config(devices=8, strategy="ddp")
    memory = predict(config)
    states = memory.parameters + memory.gradients + memory.optimizer
    assert states == 16 * count_parameters(config.model)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp1", "hsdp"])
def test_eight_devices_hold_an_eighth_of_the_states(strategy: Strategy) -> None:
    config = make_config(devices=8, strategy=strategy)
    memory = predict(config)
    states = memory.parameters + memory.optimizer
    # Rows that do not divide by eight are few.
    assert states == pytest.approx(12 * count_parameters(config.model) / 8, rel=1e-3)


def test_zero_shards_first_the_optimizer_and_then_all() -> None:
    one, three = (predict(make_config(devices=8, strategy=s)) for s in ("zero1", "zero3"))
    numbers = count_parameters(make_config().model)
    assert one.parameters == 2 * numbers  # bf16
    assert one.optimizer == 12 * -(-numbers // 8)  # float32 weights and two moments
    assert three.parameters < one.parameters / 4


def test_a_large_vocabulary_peaks_where_its_gradient_is_reduced() -> None:
    config = make_config("reference", devices=8, strategy="fsdp", num_nodes=8)
    config = replace(config, model=replace(config.model, num_layers=1))
    memory = predict(config)
    assert memory.moment == "end of the backward pass"
    outer = count_numbers(outer_parameters(config.model))
    # In bfloat16 as computed, and in float32 as reduced, of which a shard is the gradient.
    assert memory.communication + memory.gradients > 6 * outer


def test_gloo_copies_what_it_scatters_once_more() -> None:
    config = make_config("reference", devices=2, strategy="fsdp", accelerator="cpu")
    config = replace(config, model=replace(config.model, num_layers=1))
    memory = predict(config)
    assert memory.moment == "end of the backward pass"
    # Both copies in float32; the shard of the result is a gradient.
    assert memory.communication == 8 * count_numbers(outer_parameters(config.model))


@pytest.mark.parametrize(("precision", "size"), [("32-true", 4), ("bf16-mixed", 6)])
def test_deepspeed_copies_gradients_for_a_step(precision: str, size: int) -> None:
    config = make_config(devices=1, strategy="zero2", precision=precision)
    config = replace(config, model=replace(config.model, num_positions=16))
    memory = predict(config)
    assert memory.moment == "optimizer step"
    # In one array of the precision, and from there in float32 if that is another.
    assert memory.communication == size * count_parameters(config.model)


def test_deepspeed_allocates_buckets_beside_all_activations() -> None:
    config = make_config("reference", 16, devices=8, strategy="zero2")
    memory = predict(config)
    assert memory.moment == "reduction of the first gradients"
    bucket = 2 * count_parameters(config.model)  # bf16
    assert memory.communication == pytest.approx(2 * bucket, rel=0.01)
    assert memory.activations["layers"] == saved_by_kind(config)["layers"]


def test_zero3_has_gathered_weights_twice_in_the_forward_pass() -> None:
    config = make_config("reference", 8, devices=8, strategy="zero3", precision="32-true")
    config = replace(config, model=replace(config.model, num_layers=3, num_classes=2000))
    parallel = replace(config.parallel, activation_checkpointing="full")
    memory = predict(replace(config, parallel=parallel))
    assert memory.moment == "feed-forward of the last layer"
    bucket = 4 * 1024 * math.ceil(count_parameters(config.model) / 1024)
    # Fewer than 50 million numbers are gathered in one array, until the head has been used.
    assert memory.communication == bucket + memory.gathered


@pytest.mark.parametrize(("precision", "size"), [("32-true", 0), ("bf16-mixed", 2)])
def test_fsdp1_on_one_device_gathers_nothing_and_casts_weights(precision: str, size: int) -> None:
    config = make_config("reference", 64, devices=1, strategy="fsdp1", precision=precision)
    memory = predict(config)
    assert memory.gathered == size * count_numbers(outer_parameters(config.model))


def test_checkpointed_layers_keep_no_copies_of_weights_in_the_forward_pass() -> None:
    config = make_config("reference", 64, devices=8, strategy="ddp")
    parallel = replace(config.parallel, activation_checkpointing="full")
    memory = predict(replace(config, parallel=parallel))
    model = config.model
    assert memory.activations["16-bit weights"] == 2 * model.width * model.num_classes  # the head


def test_checkpointing_keeps_less() -> None:
    off, full = (
        predict(
            make_config(devices=8, strategy="fsdp", activation_checkpointing=mode, batch_size=8)
        )
        for mode in ("off", "full")
    )
    assert full.total_bytes < off.total_bytes / 2


def test_saved_kinds_add_up() -> None:
    config = make_config()
    assert sum(saved_by_kind(config).values()) == saved_bytes(config)


def test_a_device_must_have_room_for_fragmentation() -> None:
    memory = predict(make_config())
    assert memory.fits
    exact = replace(memory, capacity=memory.total_bytes)
    assert not exact.fits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(random_configs())
def test_memory_adds_up_grows_with_the_batch_and_not_with_devices(config: RunConfig) -> None:
    check_memory(config, NODE)
