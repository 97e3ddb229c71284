"""Tests loss parity: bounds, the cases of a study, and the options of each case."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from recipes import bert, gpt, vit
from recipes.options import build_config, parse
from scaling.__main__ import main
from scaling.parity.cases import (
    BOUNDS,
    STRATEGIES,
    Axes,
    Bound,
    Case,
    Curves,
    compare,
    list_cases,
    refusal,
)
from scaling.parity.recipe_runs import ParityTask, check_options
from unitransformer.config import ActivationCheckpointing, Precision, Recipe, RunConfig

HALF = Bound(loss=0.5, gradient_norm=0.25, why="powers of two are exact")
EVERYTHING = Axes(
    strategies=STRATEGIES,
    devices=(2, 4),
    precisions=get_args(Precision),
    compile=("off", "default"),
    activation_checkpointing=get_args(ActivationCheckpointing),
)
PRESETS = {"bert": bert.PRESET, "gpt": gpt.PRESET, "vit": vit.PRESET}


def curves(loss: tuple[float, ...], gradient_norm: tuple[float, ...] | None = None) -> Curves:
    return Curves(loss=loss, gradient_norm=loss if gradient_norm is None else gradient_norm)


# ---------------------------------------------------------------------------------- comparing


def test_the_largest_difference_is_relative_and_names_its_step() -> None:
    comparison = compare(
        curves((4.0, 2.0, 2.0), (1.0, 1.0, 1.0)), curves((5.0, 3.0, 1.5), (1, 1, 3))
    )
    assert (comparison.loss_difference, comparison.loss_step) == (0.5, 2)
    assert (comparison.gradient_norm_difference, comparison.gradient_norm_step) == (2.0, 3)
    assert comparison.first_loss_difference == 0.25


def test_equal_curves_have_zero_difference() -> None:
    comparison = compare(curves((3.0, 2.0)), curves((3.0, 2.0)))
    assert comparison.loss_difference == comparison.gradient_norm_difference == 0
    assert comparison.first_loss_difference == 0
    assert comparison.verdict(Bound(loss=1e-9, gradient_norm=1e-9, why="")) == "equal"


@pytest.mark.parametrize(
    ("loss", "gradient_norm", "verdict"),
    [
        (3.0, 2.0, "equal"),  # 50 % more is still within its bound
        (3.5, 2.0, "different"),
        (1.0, 2.0, "equal"),
        (0.5, 2.0, "different"),  # less counts like more
        (2.0, 2.5, "equal"),
        (2.0, 3.0, "different"),  # the gradient norm alone is enough
    ],
)
def test_loss_and_gradient_norm_must_both_be_within_their_bounds(
    loss: float, gradient_norm: float, verdict: str
) -> None:
    comparison = compare(curves((2.0,), (2.0,)), curves((loss,), (gradient_norm,)))
    assert comparison.verdict(HALF) == verdict


@pytest.mark.parametrize("other", [(), (3.0,), (3.0, 2.0, 1.0)])
def test_curves_of_different_lengths_are_refused(other: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"{len(other)} steps cannot be compared with 2"):
        compare(curves((3.0, 2.0)), curves(other))


def test_every_precision_has_bounds_and_says_why() -> None:
    assert set(BOUNDS) == set(get_args(Precision))
    assert BOUNDS["32-true"].loss == 1e-5
    for bound in BOUNDS.values():
        assert BOUNDS["32-true"].loss <= bound.loss < bound.gradient_norm < 0.2, "faults show"
        assert len(bound.why) > 20


# ---------------------------------------------------------------------------------- cases


def test_every_combination_is_tried_on_every_device_count() -> None:
    cases = list_cases(EVERYTHING, is_quick=False)
    # 4 precisions x 2 compile modes x 3 checkpointing modes, and once in micro-batches; `single`
    # is one process, the other 7 strategies have 2 device counts.
    assert len(cases) == len(set(cases)) == 25 * (1 + 7 * 2)
    assert {case.devices for case in cases if case.strategy == "single"} == {1}
    assert {case.devices for case in cases if case.strategy == "zero3"} == {2, 4}


def test_a_quick_study_varies_one_axis_at_a_time() -> None:
    cases = list_cases(replace(EVERYTHING, strategies=("fsdp",), devices=(2,)), is_quick=True)
    assert [case.label for case in cases] == [
        "fsdp x 2, 32-true",
        "fsdp x 2, 32-true, checkpointing selective",
        "fsdp x 2, 32-true, checkpointing full",
        "fsdp x 2, 32-true, compile default",
        "fsdp x 2, bf16-mixed",
        "fsdp x 2, bf16-true",
        "fsdp x 2, 16-mixed",
        "fsdp x 2, 32-true, 2 micro-batches",
    ]


def test_every_strategy_trains_on_one_device_too() -> None:
    cases = list_cases(replace(EVERYTHING, devices=(1,)), is_quick=True)
    assert {(case.strategy, case.devices) for case in cases} == {(name, 1) for name in STRATEGIES}


def test_hsdp_cases_have_two_nodes_with_at_least_two_devices() -> None:
    axes = replace(EVERYTHING, strategies=("hsdp", "fsdp"), devices=(2, 4), compile=("off",))
    spreads = {(case.strategy, case.spread) for case in list_cases(axes, is_quick=True)}
    assert spreads == {("hsdp", "2"), ("hsdp", "4 (2 nodes x 2)"), ("fsdp", "2"), ("fsdp", "4")}
    config = configure(make_task("gpt"), Case(strategy="hsdp", devices=4, num_nodes=2))
    assert (config.parallel.num_nodes, config.parallel.devices, config.batch_size) == (2, 2, 2)


def test_combinations_that_the_config_refuses_are_known_without_a_run() -> None:
    assert "does not scale the loss" in str(refusal(Case(strategy="fsdp", precision="16-mixed")))
    assert "DeepSpeed keeps float32" in str(refusal(Case(strategy="zero2", precision="bf16-true")))
    assert "choose ddp" in str(refusal(Case(strategy="single", devices=2)))
    assert refusal(Case(strategy="ddp", devices=2, precision="16-mixed")) is None


# ---------------------------------------------------------------------------------- options


def configure(task: ParityTask, case: Case) -> RunConfig:
    preset = PRESETS[task.recipe]
    request = parse(preset, task.arguments(case))
    return build_config(request, defaults=preset.cuda, devices=1)


def make_task(recipe: Recipe, *options: str) -> ParityTask:
    return ParityTask(
        recipe=recipe, accelerator="cpu", steps=24, global_batch_size=8, options=tuple(options)
    )


@pytest.mark.parametrize("recipe", get_args(Recipe))
def test_every_case_trains_the_same_model_on_the_same_batches(recipe: Recipe) -> None:
    task = make_task(recipe)
    axes = replace(EVERYTHING, strategies=("single", "fsdp1"))
    cases = list_cases(axes, is_quick=True)
    configs = {case: configure(task, case) for case in cases}
    (identity,) = {config.identity_hash() for config in configs.values()}
    assert identity == configure(task, Case(strategy="single")).identity_hash()
    for case, config in configs.items():
        parallel = config.parallel
        assert (parallel.strategy, parallel.devices) == (case.strategy, case.devices)
        assert (parallel.precision, parallel.compile) == (case.precision, case.compile)
        assert parallel.activation_checkpointing == case.activation_checkpointing
        assert (config.accumulate, config.max_steps, config.model.dropout) == (
            case.accumulate,
            24,
            0,
        )


def test_the_global_batch_is_divided_among_devices_and_micro_batches() -> None:
    config = configure(make_task("gpt"), Case(strategy="ddp", devices=2, accumulate=2))
    assert config.batch_size == 2


def test_the_model_is_small_until_a_size_is_given() -> None:
    plain = Case(strategy="single")
    assert configure(make_task("gpt"), plain).model.width == 64
    assert configure(make_task("vit"), plain).model.num_positions == 17
    assert configure(make_task("gpt", "--model.num-layers", "3"), plain).model.num_layers == 3
    whole = configure(make_task("gpt", "--size", "124m"), plain).model
    assert (whole.width, whole.num_layers, whole.num_classes) == (768, 12, 50_257)


@pytest.mark.parametrize("word", ["--devices", "--precision=bf16-true", "--max-steps", "--resume"])
def test_options_that_the_study_varies_are_refused_for_the_recipe(word: str) -> None:
    with pytest.raises(ValueError, match="is decided by the comparison; leave it out"):
        check_options(["--seed", "3", word])


# ---------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "19"], "steps is 19; it must be at least 20"),
        (["--devices", "2,0"], "devices holds '0'; give counts of at least 1, as 2,4"),
        (["--devices", "two"], "devices holds 'two'"),
        (["--devices", "3"], "global-batch-size 8 does not divide into 3 parts for ddp x 3"),
        (["--devices", "8"], "does not divide into 16 parts for ddp x 8, 32-true, 2 micro-batches"),
        (["--strategies", "dpp"], "strategies holds 'dpp'; known: single, ddp"),
        (["--precisions", "fp8"], "precisions holds 'fp8'; known: 32-true"),
        (["--compile", "on"], "compile holds 'on'; known: off, default"),
        (["--activation-checkpointing", ""], "activation-checkpointing holds ''; known: off"),
        (["--case-timeout", "0"], "case-timeout is 0.0; it must be at least 1"),
        (["--recipe", "gtp"], "recipe"),
        (["--bogus"], "--bogus is not an option; python -m scaling parity --help lists them"),
        (["--out", "file"], "out file is a file"),
        (["--", "--strategy", "ddp"], "--strategy is decided by the comparison"),
        (["--", "--rehearse", "8"], "--rehearse is decided by the comparison"),
    ],
)
def test_bad_usage_is_one_line_and_starts_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr("scaling.parity.command.certify", lambda *_: pytest.fail("a study began"))
    assert main(["parity", *arguments]) == 2
    line, end = capsys.readouterr().err.split("\n")
    assert line.startswith("error: ")
    assert message in line
    assert end == ""
