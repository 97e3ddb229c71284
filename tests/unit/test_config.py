"""Tests the run config: it refuses invalid fields by name, survives JSON, and identifies runs."""

import json
import math
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import bert, gpt, vit
from recipes.presets import Preset
from unitransformer.config import (
    CUDA_GRAPH_MODES,
    SHARDED,
    Accelerator,
    Compile,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Strategy,
    from_dict,
    hash_values,
    to_dict,
)
from unitransformer.costs.flops import count_parameters
from unitransformer.transformer import Transformer

PRESETS = (bert.PRESET, gpt.PRESET, vit.PRESET)
SIZES = [(preset, size) for preset in PRESETS for size in preset.sizes]


def model_config(**changes: Any) -> ModelConfig:
    shape = {"width": 16, "num_layers": 1, "num_heads": 2, "feedforward_width": 32}
    return ModelConfig(**{**shape, "num_classes": 10, "num_positions": 8, **changes})


def run_config(**changes: Any) -> RunConfig:
    model = changes.pop("model", model_config(causal=True))
    return RunConfig(**{"recipe": "gpt", "size": "tiny", "model": model, **changes})


def image_config(**changes: Any) -> ModelConfig:
    return model_config(**{"image_size": 16, "patch_size": 8, "num_positions": 5, **changes})


# ---- CUDA graphs


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("accelerator", ["auto", "cuda", "cpu"])
@pytest.mark.parametrize("strategy", get_args(Strategy))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_cuda_graphs_are_refused_with_micro_batches_and_layers_compiled_one_by_one(
    mode: Compile, accelerator: Accelerator, strategy: Strategy, accumulate: int
) -> None:
    def build(mode: Compile) -> RunConfig:
        parallel = ParallelConfig(strategy=strategy, accelerator=accelerator, compile=mode)
        return run_config(parallel=parallel, accumulate=accumulate)

    without = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}[mode]
    build(without)
    is_sharded = strategy in SHARDED
    if accelerator == "cpu" or not (is_sharded or accumulate == 2):
        build(mode)
        return
    cause = f"strategy {strategy}" if is_sharded else "accumulate 2"
    with pytest.raises(ValueError, match=f"^compile {mode} .* {cause}.*choose compile {without}$"):
        build(mode)


@pytest.mark.parametrize("mode", get_args(Compile))
def test_every_compile_mode_is_one_of_torch_and_only_those_with_cuda_graphs_are_listed(
    mode: Compile,
) -> None:
    options = torch._inductor.list_mode_options().get(mode, {})
    assert mode in ("off", *torch._inductor.list_mode_options())
    assert options.get("triton.cudagraphs", False) == (mode in CUDA_GRAPH_MODES)


# ---- to plain values and back


@pytest.mark.parametrize(
    ("preset", "size"), SIZES, ids=lambda value: getattr(value, "recipe", value)
)
def test_every_size_survives_json_unchanged(preset: Preset, size: str) -> None:
    before = RunConfig(
        recipe=preset.recipe,
        size=size,
        model=preset.model_config(size),
        parallel=ParallelConfig(devices=8, strategy="ddp", precision="bf16-mixed"),
    )
    after = from_dict(RunConfig, json.loads(json.dumps(to_dict(before))))
    assert after == before
    assert after.hash() == before.hash()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("sede",), 1, "config.sede is not a field; known: accumulate, batch_size"),
        (("model", "widht"), 1, "config.model.widht is not a field; known: activation"),
        (("seed",), "1", "config.seed is '1'; it must be an integer"),
        (("seed",), True, "config.seed is True; it must be an integer"),
        (("model", "width"), 16.0, "config.model.width is 16.0; it must be an integer"),
        (("model", "dropout"), "no", "config.model.dropout is 'no'; it must be a number"),
        (("model", "causal"), 1, "config.model.causal is 1; it must be true or false"),
        (("model", "image_size"), "x", "config.model.image_size is 'x'; it must be an integer"),
        (("size",), None, "config.size is None; it must be text"),
        (("recipe",), "llm", "config.recipe is 'llm'; it must be one of bert, gpt, vit"),
        (("model",), 3, "config.model is 3; it must be a group of fields"),
    ],
)
def test_a_plain_value_that_does_not_fit_is_refused_by_its_dotted_name(
    where: tuple[str, ...], value: Any, message: str
) -> None:
    values = to_dict(run_config())
    group = values
    for name in where[:-1]:
        group = group[name]
    group[where[-1]] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(RunConfig, values)


@pytest.mark.parametrize("name", ["recipe", "size", "model"])
def test_a_missing_field_is_named(name: str) -> None:
    values = to_dict(run_config())
    del values[name]
    with pytest.raises(ValueError, match=f"config.{name} is missing"):
        from_dict(RunConfig, values)


def test_an_integer_is_accepted_for_a_float() -> None:
    assert from_dict(OptimizerConfig, {"learning_rate": 1}).learning_rate == 1


def test_a_config_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        run_config().seed = 1  # type: ignore[misc]


# ---- what is refused


@pytest.mark.parametrize(
    ("kind", "name", "least"),
    [
        *((ModelConfig, name, 1) for name in ("width", "num_layers", "num_heads")),
        *((ModelConfig, name, 1) for name in ("feedforward_width", "num_classes")),
        *((ModelConfig, name, 1) for name in ("num_positions", "num_channels")),
        *((ModelConfig, name, 1) for name in ("image_size", "patch_size")),
        (DataConfig, "sequence_length", 2),
        (DataConfig, "num_workers", 0),
        *((OptimizerConfig, name, 0) for name in ("learning_rate", "weight_decay", "clip_norm")),
        (OptimizerConfig, "warmup_steps", 0),
        (OptimizerConfig, "schedule_steps", 1),
        (ParallelConfig, "devices", 1),
        (ParallelConfig, "num_nodes", 1),
        *((RunConfig, name, 1) for name in ("batch_size", "accumulate", "max_steps")),
        *((RunConfig, name, 1) for name in ("validate_every", "validation_batches", "log_every")),
        *((RunConfig, name, 0) for name in ("checkpoint_every", "seed")),
        *((RunConfig, name, 0) for name in ("loss_chunk", "loss_block")),
    ],
)
def test_a_number_below_its_minimum_is_refused(kind: type, name: str, least: int) -> None:
    build = {ModelConfig: image_config, RunConfig: run_config}.get(kind, kind)
    option = name.replace("_", "-")
    for value in (least - 1, -7):
        with pytest.raises(ValueError, match=rf"{option} is {value}; it must be at least {least}"):
            build(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "clip_norm", "epsilon", "beta1"])
def test_a_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    option = name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"optimizer\.{option} is {value}; it must be"):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (model_config, {"width": 15}, "width 15 does not divide into model.num-heads 2"),
        (model_config, {"dropout": 1.0}, "model.dropout is 1.0; it must be in [0, 1)"),
        (model_config, {"dropout": math.nan}, "model.dropout is nan; it must be in [0, 1)"),
        (
            model_config,
            {"image_size": 8},
            "image-size is 8 and model.patch-size is None; give both",
        ),
        (
            image_config,
            {"image_size": 20},
            "20 does not divide into patches of model.patch-size 8",
        ),
        (
            image_config,
            {"num_positions": 9},
            "model.num-positions is 9; images of 16 pixels in",
        ),
        (image_config, {"tied_head": True}, "model.tied-head is true; images have no token"),
        (image_config, {"causal": True}, "model.causal is true; the class token is first"),
        (OptimizerConfig, {"beta2": 1.0}, "optimizer.beta2 is 1.0; it must be in [0, 1)"),
        (OptimizerConfig, {"floor": 1.5}, "optimizer.floor is 1.5; it must be between 0 and 1"),
        (OptimizerConfig, {"epsilon": 0.0}, "optimizer.epsilon is 0.0; it must be above 0"),
        (DataConfig, {"source": ""}, "data is empty; give builtin, synthetic or a path"),
        (DataConfig, {"mask_fraction": 1.0}, "data.mask_fraction is 1.0; it must be in (0, 1)"),
        (ParallelConfig, {"strategy": "single", "devices": 2}, "single with 2 devices; choose ddp"),
        (run_config, {"seed": 2**32}, "seed is 4294967296; it must be below 2**32"),
        (
            run_config,
            {"data": DataConfig(sequence_length=9)},
            "9 is longer than model.num-positions 8",
        ),
        (run_config, {"model": model_config()}, "model.causal is false; the next token"),
        (run_config, {"recipe": "bert"}, "model.causal is true; a masked token"),
        (run_config, {"model": image_config()}, "the model reads images, recipe gpt does not"),
        (run_config, {"recipe": "vit"}, "the model reads tokens, recipe vit does not"),
        (
            run_config,
            {"recipe": "vit", "model": image_config(), "pad_vocabulary": 8},
            "pad-vocabulary is 8, but recipe vit has no vocabulary",
        ),
        (
            run_config,
            {"recipe": "bert", "model": model_config(num_positions=2)},
            "sequence-length is 2; [CLS], a token and [SEP] need 3",
        ),
        (
            run_config,
            {"recipe": "vit", "model": image_config(), "data": DataConfig(sequence_length=3)},
            "sequence-length is 3; the length of an image is its number of patches",
        ),
    ],
)
def test_an_impossible_config_is_refused_with_values_and_fix(
    build: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**changes)


# ---- what a run is called


def test_length_and_device_layout_do_not_change_the_identity_of_a_run() -> None:
    before = run_config(batch_size=8)
    longer = replace(before, max_steps=1000, log_every=1, validate_every=3, checkpoint_every=5)
    spread = replace(before, batch_size=2, accumulate=2, parallel=ParallelConfig(devices=2))
    assert before.identity_hash() == longer.identity_hash() == spread.identity_hash()
    assert len({before.hash(), longer.hash(), spread.hash()}) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"batch_size": 9},
        {"data": DataConfig(source="synthetic")},
        {"optimizer": OptimizerConfig(learning_rate=1.0)},
        {"model": model_config(causal=True, dropout=0.1)},
    ],
)
def test_settings_that_change_the_training_change_the_identity_of_a_run(
    changes: dict[str, Any],
) -> None:
    assert run_config(**changes).identity_hash() != run_config().identity_hash()


def test_loader_processes_do_not_change_the_identity_of_a_run() -> None:
    with_workers = run_config(data=DataConfig(num_workers=3))
    assert with_workers.identity_hash() == run_config().identity_hash()


def test_options_added_for_text_files_change_the_identity_of_a_run_only_if_they_are_given() -> None:
    plain = run_config()
    without = {
        k: v for k, v in plain.identity().items() if k not in ("data.encoding", "data.field")
    }
    assert plain.identity_hash() == hash_values(without)[:8]
    text = DataConfig(source="text")
    others = [replace(text, encoding="cp1252"), replace(text, field="body")]
    assert len({run_config(data=data).identity_hash() for data in (text, *others)}) == 3


@pytest.mark.parametrize(
    ("multiple", "num_logits"), [(0, 60), (1, 60), (60, 60), (64, 64), (128, 128), (7, 63)]
)
def test_a_vocabulary_is_padded_to_a_multiple_and_the_run_keeps_its_identity(
    multiple: int, num_logits: int
) -> None:
    model = replace(run_config().model, num_classes=60)
    plain = run_config(model=model)
    padded = run_config(model=model, pad_vocabulary=multiple)
    assert padded.num_logits == num_logits
    assert padded.identity() == plain.identity()


def test_an_encoding_has_one_name() -> None:
    names = ("latin-1", "ISO-8859-1", "iso8859_1", "l1")
    assert {DataConfig(source="text", encoding=name).encoding for name in names} == {"iso8859-1"}


@pytest.mark.parametrize(
    "name", ["", "utf-9", "hex", "rot13", "idna", "unicode_escape", "utf-7", "iso2022_jp", "a\0"]
)
def test_an_encoding_that_no_text_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="it must be an encoding that Python knows") as caught:
        DataConfig(source="text", encoding=name)
    assert str(caught.value).startswith(f"data-encoding is {name!r}; ")


def test_a_global_batch_counts_every_device_of_every_node() -> None:
    parallel = ParallelConfig(devices=4, num_nodes=2)
    assert run_config(batch_size=3, accumulate=5, parallel=parallel).global_batch_size == 120


# ---- any model that can be described can be built


def _shapes() -> st.SearchStrategy[dict[str, Any]]:
    """The width is a multiple of the heads, so that every generated config is valid."""
    heads = st.integers(1, 4).flatmap(
        lambda heads: st.integers(1, 5).map(lambda w: {"num_heads": heads, "width": heads * w})
    )
    common = st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 3),
            "feedforward_width": st.integers(1, 9),
            "num_classes": st.integers(1, 9),
            "dropout": st.sampled_from([0.0, 0.5]),
            "activation": st.sampled_from(["relu", "gelu"]),
            "final_norm": st.booleans(),
            "head_bias": st.booleans(),
        }
    )
    return st.builds(lambda a, b: {**a, **b}, heads, common)


TOKENS = st.fixed_dictionaries(
    {"num_positions": st.integers(1, 9), "causal": st.booleans(), "tied_head": st.booleans()}
)
IMAGES = st.builds(
    lambda patch, grid, channels: {
        "patch_size": patch,
        "image_size": grid * patch,
        "num_positions": grid**2 + 1,
        "num_channels": channels,
    },
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
)


@settings(max_examples=100, deadline=None, database=None)
@given(shape=_shapes(), reads=st.one_of(TOKENS, IMAGES))
def test_any_model_config_builds_with_the_computed_parameter_count(
    shape: dict[str, Any], reads: dict[str, Any]
) -> None:
    config = ModelConfig(**shape, **reads)
    with torch.device("meta"):
        network = Transformer(config)
    assert count_parameters(config) == sum(p.numel() for p in network.parameters())
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
