"""Parses and checks the options of `python -m scaling parity`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from scaling.parity.cases import BOUND_STEPS, LEAST_STEPS, STRATEGIES, Axes, list_cases
from scaling.parity.recipe_runs import check_options
from scaling.stored_command import stored_command
from unitransformer.cli import Parser
from unitransformer.config import Accelerator, ActivationCheckpointing, Compile, Precision, Recipe

DEFAULT_OUT = Path("scaling/results/records")


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """The checked options of `python -m scaling parity`."""

    recipes: tuple[Recipe, ...]
    axes: Axes
    is_quick: bool
    steps: int
    global_batch_size: int
    accelerator: str
    limit_s: float  # per case
    out: Path
    recipe_options: tuple[str, ...]  # those after `--`
    command: str  # as typed


def build_parity_parser() -> Parser:
    parser = Parser(
        usage="python -m scaling parity [options] [-- options of the recipe]",
        description="Train the same model with every strategy and setting, compare loss and "
        "gradient norm of each step with one plain float32 process, and write a certificate. Exit "
        "code 0: all cases are equal or refused; 1: a case differs or failed, or no case of a "
        "strategy is equal. Options after -- go to the recipe.",
    )

    def add(flag: str, kind: Any, default: Any, help_text: str) -> None:
        parser.add_argument(flag, type=kind, default=default, help=help_text)

    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    add("--recipe", Literal[*get_args(Recipe), "all"], "all", "models to train")
    add("--devices", str, "2", "device counts, such as 2,4")
    values = "comma-separated values"
    add("--strategies", str, ",".join(STRATEGIES), values)
    add("--precisions", str, ",".join(get_args(Precision)), values)
    add("--compile", str, "off,default", values)
    add("--activation-checkpointing", str, ",".join(get_args(ActivationCheckpointing)), values)
    parser.add_argument(
        "--quick", action="store_true", help="vary one axis at a time, not all combinations"
    )
    add(
        "--steps",
        int,
        BOUND_STEPS,
        f"at least {LEAST_STEPS}; the bounds were measured with {BOUND_STEPS}",
    )
    add("--global-batch-size", int, 8, "samples per step over all devices")
    add("--accelerator", Accelerator, "auto", "auto uses GPUs if there are any")
    add("--case-timeout", float, 600.0, "seconds after which a run fails")
    add("--out", Path, DEFAULT_OUT, "folder for certificates")
    return parser


def read_parity_options(
    given: Any, recipe_options: Sequence[str], arguments: Sequence[str]
) -> ParityOptions:
    """Checks the options; raises ValueError naming option, value and fix.

    `recipe_options` stand after `--`; `arguments` are the whole command line.
    """
    checkpointing = given.activation_checkpointing, get_args(ActivationCheckpointing)
    axes = Axes(
        strategies=_chosen("strategies", given.strategies, STRATEGIES),
        devices=_counts("devices", given.devices),
        precisions=_chosen("precisions", given.precisions, get_args(Precision)),
        compile=_chosen("compile", given.compile, get_args(Compile)),
        activation_checkpointing=_chosen("activation-checkpointing", *checkpointing),
    )
    for name, value, least in (
        ("steps", given.steps, LEAST_STEPS),
        ("global-batch-size", given.global_batch_size, 1),
        ("case-timeout", given.case_timeout, 1),
    ):
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    check_options(recipe_options)
    for case in list_cases(axes, is_quick=given.quick):
        parts = case.devices * case.accumulate
        if given.global_batch_size % parts:
            raise ValueError(
                f"global-batch-size {given.global_batch_size} does not divide into {parts} parts "
                f"for {case.label}; choose a multiple of {parts}"
            )
    return ParityOptions(
        recipes=get_args(Recipe) if given.recipe == "all" else (given.recipe,),
        axes=axes,
        is_quick=given.quick,
        steps=given.steps,
        global_batch_size=given.global_batch_size,
        accelerator=given.accelerator,
        limit_s=given.case_timeout,
        out=given.out,
        recipe_options=tuple(recipe_options),
        command=stored_command(arguments),
    )


def _chosen(option: str, text: str, known: Sequence[Any]) -> tuple[Any, ...]:
    names = _split(text)
    for name in names:
        if name not in known:
            raise ValueError(f"{option} holds {name!r}; known: {', '.join(known)}")
    return names


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _counts(option: str, text: str) -> tuple[int, ...]:
    names = _split(text)
    for name in names:
        if not (name.isdecimal() and int(name) > 0):
            raise ValueError(f"{option} holds {name!r}; give counts of at least 1, as 2,4")
    return tuple(map(int, names))
