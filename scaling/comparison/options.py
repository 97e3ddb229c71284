"""The options of `python -m scaling compare`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from scaling.changed_options import changed_options
from scaling.comparison.verdict import LOOKS, STOP_FASTER, THRESHOLD, looks_upto
from scaling.recipe_process import RESERVED_OPTIONS
from scaling.stored_command import stored_command
from unitransformer.cli import Parser, read_yaml, suggest
from unitransformer.config import Recipe
from unitransformer.files import check_writable

MIN_PAIRS = 2 * LOOKS[0]  # two looks
ClockChoice = Literal["auto", "processor", "gpu", "wall"]
TRIALS = 60
# Options of a recipe that a comparison sets itself.
DECIDED_OPTIONS = {f"--{n.replace('_', '-')}" for n in RESERVED_OPTIONS if n != "config"} | {
    "--max-steps",
    "--until-interval",
    "--validate-every",
    "--num-nodes",
    "-h",
}


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The checked options."""

    base: str
    candidate: str
    package: str | None  # its name, where two versions are compared; base and candidate are these
    recipe: Recipe
    recipe_options: tuple[str, ...]  # those after `--`
    looks: tuple[int, ...]
    threshold: float
    stop_faster: float
    clock: ClockChoice
    seed: int
    out: Path | None
    plot: Path | None
    leaves_changes_out: bool
    pip_options: tuple[str, ...]  # where packages come from
    command: str


def build_compare_parser() -> Parser:
    parser = Parser(
        usage="python -m scaling compare BASE CANDIDATE [options] [-- recipe and its options]",
        description="Train BASE and CANDIDATE in turn, a process each, and say whether CANDIDATE "
        "is slower. Each is one of, tried in this order: '.', the files as they are now; options "
        "of the recipe in quotes, which begin with - and hold a space, or '' for none; a YAML file "
        "of options; a folder of run records; a git revision. After -- stand a recipe, gpt if it "
        "is left out, and options that both sides get. Exit codes: 0 not slower, 1 a side does not "
        "train, 2 bad usage, 3 inconclusive, 4 slower, 5 faster by so much that the base is stale.",
    )

    def add(flag: str, kind: Any, default: Any, help_text: str) -> None:
        parser.add_argument(flag, type=kind, default=default, help=help_text)

    parser.add_argument("base", nargs="?", metavar="BASE", help="what was there before")
    parser.add_argument("candidate", nargs="?", metavar="CANDIDATE", help="what is judged")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    add("--package", str | None, None, "NAME==BASE,CANDIDATE: two versions, installed if need be")
    add_pip_options(parser)
    add("--threshold", float, THRESHOLD, "slowdown that must not pass; 0.02 is 2 percent")
    add("--stop-faster", float, STOP_FASTER, "speed-up that stops too: the base is stale")
    add("--pairs", int, LOOKS[-1], "most pairs to measure; it stops before, once they decide")
    add("--clock", ClockChoice, "auto", "that decides; auto: gpu on a GPU, otherwise processor")
    add("--seed", int, 0, "of the order within the pairs")
    add("--out", Path | None, None, "file for the record with all pairs")
    add("--plot", Path | None, None, "file for a plot of the pairs: .png or .svg")
    add("--reread", Path | None, None, "judge the pairs of this record again; measures nothing")
    parser.add_argument(
        "--dirty", action="store_true", help="compare revisions though files have changed since"
    )
    parser.add_argument(
        "--self-test", action="store_true", help="check the verdicts on this machine, under load"
    )
    add("--trials", int, TRIALS, "of the self-test; 500 are the long form")
    return parser


def add_pip_options(parser: Parser) -> None:
    """Adds the options that say where pip finds versions; its variables PIP_* count too."""
    for flag, what in (("--index-url", "index"), ("--find-links", "folder or page of files")):
        help_text = f"{what} from which pip installs versions that are missing"
        parser.add_argument(flag, type=str | None, default=None, help=help_text)


def read_pip_options(given: Any) -> tuple[str, ...]:
    """Returns what `add_pip_options` added as options of pip."""
    files = given.find_links
    if files is not None and Path(files).exists():
        files = str(Path(files).resolve())
    values = {"--index-url": given.index_url, "--find-links": files}
    return tuple(f"{flag}={value}" for flag, value in values.items() if value is not None)


def read_compare_options(
    given: Any, recipe_options: Sequence[str], arguments: Sequence[str]
) -> CompareOptions:
    """Checks the options; raises ValueError naming option, value and fix.

    `recipe_options` stand after `--`; `arguments` are the whole command line.
    """
    check_measurement(given, "threshold", "stop_faster")
    if given.trials != TRIALS:
        raise ValueError(f"trials is {given.trials}, which is of the self-test; add --self-test")
    recipe, recipe_options = split_recipe(recipe_options)
    check_recipe_options(recipe_options, "after --")
    if given.out is not None:
        check_writable("out", given.out, is_folder=False)
    _check_plot(given.plot)
    base, candidate, package = _what_is_compared(given)
    return CompareOptions(
        base=base,
        candidate=candidate,
        package=package,
        recipe=recipe,
        recipe_options=tuple(recipe_options),
        looks=looks_upto(given.pairs),
        threshold=given.threshold,
        stop_faster=given.stop_faster,
        clock=given.clock,
        seed=given.seed,
        out=given.out,
        plot=given.plot,
        leaves_changes_out=given.dirty,
        pip_options=read_pip_options(given),
        command=stored_command(arguments),
    )


def check_measurement(given: Any, *shares: str) -> None:
    """Raises ValueError for a share, pairs or seed with which nothing can be measured."""
    for name in shares:
        if not 0 < given[name] < 1:
            option = name.replace("_", "-")
            raise ValueError(
                f"{option} is {given[name]:g}; give a share between 0 and 1, such as 0.02"
            )
    if given.pairs < MIN_PAIRS:
        raise ValueError(f"pairs is {given.pairs}; a verdict needs at least {MIN_PAIRS}")
    if given.seed < 0:
        raise ValueError(f"seed is {given.seed}; it must be at least 0")


def check_unused_options(given: Any, recipe_options: Sequence[str]) -> None:
    """Checks the options of --self-test and --reread; raises ValueError as `read_compare_options`.

    Both need no BASE and CANDIDATE: what they do not use must not seem to count.
    """
    option = "self-test" if given.self_test else "reread"
    if recipe_options:
        recipe = " ".join(recipe_options)
        raise ValueError(f"--{option} does not use the recipe after -- ({recipe}); leave it out")
    used = {"self-test": ("trials", "out"), "reread": ("plot",)}[option]
    for name, value in changed_options(given, build_compare_parser()).items():
        if name not in (option, "config", *used):
            shown = name.upper() if name in ("base", "candidate") else f"--{name}"
            raise ValueError(f"--{option} does not use {shown} ({value}); leave it out")
    if given.out is not None:
        check_writable("out", given.out, is_folder=False)
    _check_plot(given.plot)


def _check_plot(path: Path | None) -> None:
    if path is not None:
        check_writable("plot", path, is_folder=False)
        if path.suffix not in (".png", ".svg"):
            raise ValueError(f"plot {path} must end in .png or .svg")


def split_recipe(passed_on: Sequence[str]) -> tuple[Recipe, Sequence[str]]:
    """Splits what stands after `--` into the recipe, gpt if none is named, and its options.

    Raises ValueError for an unknown recipe.
    """
    if not passed_on or passed_on[0].startswith("-"):
        return "gpt", passed_on
    for recipe in get_args(Recipe):
        if passed_on[0] == recipe:
            return recipe, passed_on[1:]
    raise ValueError(
        f"{passed_on[0]} after -- is not a recipe; {suggest(passed_on[0], get_args(Recipe))}"
    )


def check_recipe_options(options: Sequence[str], where: str, *, on_one_device: bool = True) -> None:
    """Raises ValueError for an option that the comparison decides, or that trains on more.

    Files of options are read too.
    """
    for option, following in itertools.zip_longest(options, options[1:], fillvalue=""):
        name, _, given = option.partition("=")
        value = given or following
        if name.replace("_", "-") in DECIDED_OPTIONS:
            raise ValueError(f"{name} {where} is decided by the comparison; leave it out")
        if on_one_device and name == "--devices" and value != "1":
            raise ValueError(
                f"devices {where} is {value}; a comparison trains on one device: leave it out"
            )
        if name == "--config":
            in_file = _read_config(value, where)
            check_recipe_options(in_file, f"in {value} {where}", on_one_device=on_one_device)


def _read_config(config: str, where: str) -> list[str]:
    """Returns the options in a file, or in YAML itself, as they would be typed."""
    path = Path(config)
    try:
        values = read_yaml(path.read_text(encoding="utf-8") if path.is_file() else config)
    except (OSError, ValueError) as error:
        raise ValueError(f"config {config} {where}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {config} {where} is no file of options")
    if "config" in values:
        raise ValueError(f"config {config} {where} names another file; give its options instead")
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def _what_is_compared(given: Any) -> tuple[str, str, str | None]:
    if given.package is None:
        if given.base is None or given.candidate is None:
            raise ValueError(
                "compare needs BASE and CANDIDATE: python -m scaling compare HEAD . -- gpt "
                "--batch-size 8"
            )
        return given.base, given.candidate, None
    if given.base is not None:
        raise ValueError(
            f"package {given.package} already says what is compared; leave {given.base} out"
        )
    name, versions = split_package(given.package)
    if len(versions) != 2:
        raise ValueError(
            f"package is {given.package!r}; give two versions, as torch==2.13.0,2.14.1"
        )
    if versions[0] == versions[1]:
        raise ValueError(f"package is {given.package!r}, twice the same version; give two")
    if given.dirty:
        raise ValueError("dirty is only for two revisions; leave --dirty out")
    return versions[0], versions[1], name


def split_package(text: str) -> tuple[str, tuple[str, ...]]:
    """Splits NAME==V1,V2,... into the name and its versions, none if it has another form.

    Raises ValueError for what no version is called.
    """
    from packaging.version import InvalidVersion, Version

    name, _, rest = (part.strip() for part in text.partition("=="))
    versions = tuple(version.strip() for version in rest.split(","))
    if not name or not all(versions):
        return name, ()
    for version in versions:
        try:
            Version(version)
        except InvalidVersion:
            raise ValueError(
                f"package is {text!r}, but {version!r} is no version; give numbers, as "
                "torch==2.13.0,2.14.1"
            ) from None
    return name, versions
