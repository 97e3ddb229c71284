"""The options of `python -m scaling bisect`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scaling.comparison.options import (
    ClockChoice,
    add_pip_options,
    check_measurement,
    check_recipe_options,
    read_pip_options,
    split_package,
    split_recipe,
)
from scaling.comparison.verdict import LOOKS, THRESHOLD, looks_upto
from scaling.stored_command import stored_command
from unitransformer.cli import Parser
from unitransformer.config import Recipe
from unitransformer.files import check_writable

Criterion = Literal["time", "counters"]
DEFAULT_OUT = Path("runs/bisect")


@dataclass(frozen=True, kw_only=True)
class BisectOptions:
    """The checked options."""

    good: str
    bad: str
    package: str | None
    versions: tuple[str, ...]  # of the package, in order; empty: revisions are measured
    recipe: Recipe
    recipe_options: tuple[str, ...]
    criterion: Criterion
    looks: tuple[int, ...]
    threshold: float
    clock: ClockChoice
    seed: int
    out: Path
    pip_options: tuple[str, ...]  # where packages come from
    command: str


def build_bisect_parser() -> Parser:
    parser = Parser(
        usage="python -m scaling bisect GOOD BAD [options] [-- recipe and its options]",
        description="Find the commit between GOOD and BAD that made a training step slower. Each "
        "candidate is trained in turn with GOOD, as by `compare`. Revisions are copied to a "
        "temporary folder: your files, index and branches stay as they are. The same command goes "
        "on where it was stopped. After -- stand a recipe, gpt if it is not named, and its "
        "options. Exit codes: 0 BAD is not slower, 1 GOOD or BAD does not train, 2 "
        "bad usage, 3 inconclusive, 4 slower.",
    )

    def add(flag: str, kind: Any, default: Any, help_text: str) -> None:
        parser.add_argument(flag, type=kind, default=default, help=help_text)

    parser.add_argument("good", nargs="?", metavar="GOOD", help="revision that was fast")
    parser.add_argument("bad", nargs="?", metavar="BAD", help="later revision that is slow")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    add("--package", str | None, None, "NAME==V1,V2,...: versions instead of revisions, in order")
    add_pip_options(parser)
    add("--by", Criterion, "time", "counters: operators, FLOPs, bytes and more, without timing")
    add("--threshold", float, THRESHOLD, "slowdown of BAD that is looked for; 0.02 is 2 %")
    add("--pairs", int, 2 * LOOKS[-1], "most pairs for each candidate; undecided ones are skipped")
    add("--clock", ClockChoice, "auto", "that decides; auto: gpu on a GPU, otherwise processor")
    add("--seed", int, 0, "of the order within the pairs")
    add("--out", Path, DEFAULT_OUT, "folder that keeps what was measured")
    return parser


def read_bisect_options(
    given: Any, recipe_options: Sequence[str], arguments: Sequence[str]
) -> BisectOptions:
    """Checks the options; raises ValueError naming option, value and fix.

    `recipe_options` stand after `--`; `arguments` are the whole command line.
    """
    check_measurement(given, "threshold")
    recipe, recipe_options = split_recipe(recipe_options)
    check_recipe_options(recipe_options, "after --", on_one_device=given.by == "time")
    check_writable("out", given.out, is_folder=True)
    versions: tuple[str, ...] = ()
    package = None
    if given.package is not None:
        package, versions = _read_package(given)
    elif given.good is None or given.bad is None:
        raise ValueError(
            "bisect needs GOOD and BAD: python -m scaling bisect v1.0 HEAD -- gpt --batch-size 8"
        )
    return BisectOptions(
        good=versions[0] if versions else given.good,
        bad=versions[-1] if versions else given.bad,
        package=package,
        versions=versions,
        recipe=recipe,
        recipe_options=tuple(recipe_options),
        criterion=given.by,
        looks=looks_upto(given.pairs),
        threshold=given.threshold,
        clock=given.clock,
        seed=given.seed,
        out=given.out,
        pip_options=read_pip_options(given),
        command=stored_command(arguments),
    )


def _read_package(given: Any) -> tuple[str, tuple[str, ...]]:
    if given.good is not None:
        raise ValueError(
            f"package {given.package} already says what is compared; leave {given.good} out"
        )
    name, versions = split_package(given.package)
    if len(versions) < 2:
        raise ValueError(
            f"package is {given.package!r}; give two or more versions, as torch==2.12.0,2.13.0"
        )
    return name, versions
