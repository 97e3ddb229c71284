"""Tests the options of a comparison."""

from collections.abc import Sequence

import pytest

from scaling.comparison.options import CompareOptions, build_compare_parser, read_compare_options


def read(*arguments: str, passed_on: Sequence[str] = ()) -> CompareOptions:
    given = build_compare_parser().parse_args(list(arguments))
    return read_compare_options(given, passed_on, ["compare", *arguments])


def test_the_recipe_stands_after_the_dashes() -> None:
    options = read("old", "new", passed_on=["vit", "--seed", "1"])
    assert (options.recipe, options.recipe_options) == ("vit", ("--seed", "1"))
    assert read("old", "new", passed_on=["--seed", "1"]).recipe == "gpt"


def test_two_versions_of_a_package_need_no_base_and_candidate() -> None:
    options = read("--package", "torch==2.13.0, 2.14.1")
    assert (options.package, options.base, options.candidate) == ("torch", "2.13.0", "2.14.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "compare needs BASE and CANDIDATE"),
        (("old",), "compare needs BASE and CANDIDATE"),
        (("--package", "torch"), "package is 'torch'; give two versions"),
        (("--package", "torch==1"), "package is 'torch==1'; give two versions"),
        (("--package", "torch==1,1"), "package is 'torch==1,1', twice the same version; give two"),
        (("--package", "torch==1,2", "--dirty"), "dirty is only for two revisions"),
        (("old", "--package", "torch==1,2"), "already says what is compared; leave old out"),
        (("old", "new", "--pairs", "159"), "pairs is 159; a verdict needs at least 160"),
        (("old", "new", "--threshold", "0"), "threshold is 0; give a share between 0 and 1"),
        (("old", "new", "--stop-faster", "2"), "stop-faster is 2; give a share"),
        (("old", "new", "--seed", "-1"), "seed is -1; it must be at least 0"),
        (("old", "new", "--plot", "pairs.txt"), "plot pairs.txt must end in .png or .svg"),
        (("old", "new", "--out", "/proc/no/file"), "out /proc/no/file"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(*arguments)


@pytest.mark.parametrize(
    ("passed_on", "message"),
    [
        (["gtp"], "gtp after -- is not a recipe; did you mean gpt"),
        (["gpt", "--devices=2"], "devices after -- is 2; a comparison trains on one device"),
        (["--validate-every", "5"], "--validate-every after -- is decided by the comparison"),
        (["--config", "{devices: 2}"], "devices in {devices: 2} after -- is 2; a comparison"),
        (["--no_checkpoint"], "--no_checkpoint after -- is decided by the comparison"),
    ],
)
def test_recipe_options_that_the_comparison_decides_are_refused(
    passed_on: Sequence[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read("old", "new", passed_on=passed_on)
