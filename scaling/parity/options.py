"""Options of `python -m scaling parity`: a command line in, what is compared and how out."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jsonargparse

from scaling.parity.cases import LEAST_STEPS, STRATEGIES, Axes, list_cases
from scaling.parity.recipe_arguments import check_batch, check_options
from scaling.parity.study import ParityOptions
from unitransformer.config import Accelerator, ActivationCheckpointing, Compile, Precision, Recipe

DEFAULT_OUT = Path("scaling/results/records")


def build_parity_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        usage="python -m scaling parity [options] [-- options of the recipe]",
        description="Train the same model in every way and compare the loss and the gradient norm "
        "of each step with those of one plain float32 process. Writes a certificate. Exit code 0: "
        "all equal, 1: something differs or failed, or of a strategy all is refused. What follows "
        "-- goes to the recipe.",
        exit_on_error=False,
    )
    everything = {
        "strategies": ",".join(STRATEGIES),
        "precisions": ",".join(get_args(Precision)),
        "compile": "off,default",
        "activation-checkpointing": ",".join(get_args(ActivationCheckpointing)),
    }
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--recipe", type=Literal[*get_args(Recipe), "all"], default="all", help="what is trained"
    )
    parser.add_argument("--devices", type=str, default="2", help="device counts, as 2,4")
    for name, default in everything.items():
        parser.add_argument(f"--{name}", type=str, default=default, help="some of these")
    parser.add_argument(
        "--quick", action="store_true", help="one axis at a time in place of every combination"
    )
    parser.add_argument("--steps", type=int, default=24, help=f"at least {LEAST_STEPS}")
    parser.add_argument(
        "--global-batch-size", type=int, default=8, help="samples of a step over all devices"
    )
    parser.add_argument(
        "--accelerator", type=Accelerator, default="auto", help="auto takes GPUs if there are some"
    )
    parser.add_argument(
        "--case-timeout", type=float, default=600.0, help="seconds until a run has failed"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the certificates")
    return parser


def read_parity_options(
    given: Any, recipe_options: Sequence[str], words: Sequence[str]
) -> ParityOptions:
    """What was asked for, checked.

    Args:
        given: as the parser read it.
        recipe_options: what followed `--`.
        words: the whole command line.

    Raises:
        ValueError: naming option, value and fix.
    """
    axes = Axes(
        strategies=_chosen("strategies", given.strategies, STRATEGIES),
        devices=_counts("devices", given.devices),
        precisions=_chosen("precisions", given.precisions, get_args(Precision)),
        compile=_chosen("compile", given.compile, get_args(Compile)),
        activation_checkpointing=_chosen(
            "activation-checkpointing",
            given.activation_checkpointing,
            get_args(ActivationCheckpointing),
        ),
    )
    for name, value, least in (
        ("steps", given.steps, LEAST_STEPS),
        ("global-batch-size", given.global_batch_size, 1),
        ("case-timeout", given.case_timeout, 1),
    ):
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    check_options(recipe_options)
    check_batch(given.global_batch_size, list_cases(axes, is_quick=given.quick))
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
        command=f"python -m scaling {shlex.join(words)}",
    )


def _chosen(option: str, text: str, known: Sequence[Any]) -> tuple[Any, ...]:
    """Some of `known`, in a list with commas."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"{option} holds {name!r}; known: {', '.join(known)}")
    return names


def _counts(option: str, text: str) -> tuple[int, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if not (name.isdecimal() and int(name) > 0):
            raise ValueError(f"{option} holds {name!r}; give counts of at least 1, as 2,4")
    return tuple(map(int, names))
