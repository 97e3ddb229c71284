"""Tests the options of `predict`, and the configurations that they describe."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from scaling.prediction.hardware import load_hardware
from scaling.prediction.options import (
    PredictOptions,
    build_configs,
    build_predict_parser,
    check_validate,
    parse_command,
    read_devices,
    read_predict_options,
    resolve_on,
)

ZERO = ("zero1", "zero2", "zero3")
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
        ({"batch-size": ["0"]}, "^batch-size is 0; it must be at least 1"),
        ({"batch-size": ["x"]}, "^batch-size is 'x'; it must be an integer"),
        ({"batch-size": ["16777217"]}, "batch-size is 16777217; predictions reach 16,777,216"),
        ({"accumulate": ["1", "2000000"]}, "accumulate is 2000000; predictions reach 1,048,576"),
        ({"sequence-length": ["-3"]}, "^sequence-length is -3; it must be at least 2"),
        ({"data-encoding": ["x"]}, "^data-encoding is 'x'; it must be an encoding"),
        ({"size": ["6.8b"]}, "size '6.8b' is not known; did you mean 6.7b"),
        ({"strategy": ["fsdpp"]}, "strategy is 'fsdpp'; it must be one of auto, single, ddp"),
        ({"model.num-heads": ["7"]}, "width 768 does not divide into model.num-heads 7"),
        ({"batch-sice": ["1"]}, "--batch-sice.* is not an option; did you mean --batch-size"),
        ({"num-nodes": ["2"]}, "--num-nodes does not suit a prediction"),
        ({"rehearse": ["8"]}, "--rehearse does not suit a prediction: it runs nothing"),
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
        ("x", "devices is 'x'; give integers and commas, such as 8,64"),
        ("8,", "devices is '8,', with '' in it; give integers and commas, such as 8,64"),
    ],
)
def test_devices_make_whole_nodes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_devices(text, NODE)
    assert read_devices("1,8,16384,8", NODE) == (1, 8, 16_384)


def read(axes: dict[str, list[str]] | None = None, **changes: object) -> PredictOptions:
    names = (
        "recipe",
        "hardware",
        "calibration",
        "tokens",
        "price_per_hour",
        "rows",
        "plot",
        "html",
    )
    given = dict.fromkeys(names) | {"best": False, "devices": "8", "recipe": "gpt"}
    given |= {"hardware": "h200-sxm-8", **changes}
    return read_predict_options(SimpleNamespace(**given), {"size": ["124m"]} | (axes or {}))


def test_the_best_is_searched_among_options_that_are_not_given() -> None:
    assert len(read().configs) == 1
    options = read(best=True)
    assert options.searched == ("strategy", "batch-size", "activation-checkpointing")
    assert {c.parallel.strategy for c in options.configs} == {"ddp", "fsdp", "hsdp", *ZERO}
    assert {c.batch_size for c in options.configs} == {1}  # from which it is doubled
    given = {"strategy": ["auto"], "batch-size": ["4", "8"]}
    options = read(axes=given, best=True)
    assert options.searched == ("strategy", "activation-checkpointing")
    assert {c.parallel.strategy for c in options.configs} == {"ddp", "fsdp", "hsdp", *ZERO}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "gtp"}, "recipe is gtp; did you mean gpt"),
        ({"recipe": None}, "recipe is missing; known: bert, gpt, vit"),
        ({"hardware": None}, "hardware is missing; give one of a100-40-sxm-8"),
        ({"hardware": "h100"}, "hardware h100 is unknown; did you mean h100-sxm-8"),
        ({"price_per_hour": -2.0, "tokens": "1e9"}, "price-per-hour is -2.0; it must be above 0"),
        ({"price_per_hour": 2.0}, "price-per-hour is 2.0, but nothing is priced; add --tokens"),
        ({"tokens": "many"}, "tokens is many; it must be a number above 0, such as 300e9"),
        ({"tokens": "-1"}, "tokens is -1; it must be a number above 0"),
        ({"calibration": Path("x.json")}, "calibration x.json does not exist; check the path"),
        (
            {"calibration": Path(__file__)},
            "but hardware is h200-sxm-8; use it with --hardware this-mach",
        ),
        ({"rows": "x.csv"}, "rows is x.csv; it needs --validate"),
    ],
)
def test_bad_options_name_option_value_and_fix(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_validating_refuses_options_that_it_does_not_use() -> None:
    given = build_predict_parser().parse_args(["--validate", "--recipe=gpt", "--price-per-hour=3"])
    with pytest.raises(ValueError, match="does not use --recipe, --price-per-hour, --size; leave"):
        check_validate(given, {"size": ["124m"]})
    with pytest.raises(ValueError, match="does not use --best; leave it or --validate out"):
        check_validate(build_predict_parser().parse_args(["--validate", "--best"]), {})
    check_validate(build_predict_parser().parse_args(["--validate", "--rows=x.csv"]), {})


def test_the_parser_lists_every_hardware() -> None:
    assert "mi355x-8, this-machine" in build_predict_parser().format_help().replace("\n", " ")


def test_on_a_cpu_a_command_runs_one_process_unless_it_says_more() -> None:
    cpu = replace(NODE, name="this-machine", gpu=None, devices_per_node=2)
    parallel = resolve_on(parse_command("gpt", []), cpu)[0].parallel
    assert (parallel.accelerator, parallel.strategy, parallel.precision) == (
        "cpu",
        "single",
        "32-true",
    )
    config, nodes, _ = resolve_on(parse_command("gpt", ["--devices", "2"]), cpu)
    assert (config.parallel.strategy, nodes.devices_per_node) == ("ddp", 2)
    with pytest.raises(ValueError, match="cpu-offload is for GPUs"):
        resolve_on(parse_command("gpt", ["--cpu-offload", "--strategy", "fsdp"]), cpu)
    with pytest.raises(ValueError, match="accelerator is cuda, which this-machine is not"):
        resolve_on(parse_command("gpt", ["--accelerator", "cuda"]), cpu)
