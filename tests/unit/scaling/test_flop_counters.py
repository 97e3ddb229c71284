"""Tests `python -m scaling counters`: its table, and what it refuses."""

import pytest

from scaling.__main__ import main
from scaling.flop_counters import render

COUNTS = {
    "true": {"suite": 2e9, "plain": 4e9},
    "rows": [
        {
            **{"name": "profile", "package": "one", "version": "1.2", "unit": "MAC"},
            **{"counted": {"suite": 0.5e9, "plain": 1e9}, "reason": "no attention"},
        },
        {"name": "count", "package": "two", "version": None, "unit": "FLOP", "reason": ""},
        {"name": "profile", "package": "thop", "version": None, "unit": "MAC", "reason": ""},
        {
            **{"name": "measure", "package": "three", "version": "3", "unit": "FLOP"},
            **{"error": "TypeError: no", "reason": "all"},
        },
    ],
}


def test_multiply_adds_count_twice_and_missing_packages_are_one_line() -> None:
    lines = render("gpt reference", COUNTS).splitlines()
    assert lines[0].startswith("gpt reference: a forward pass of one sample is 2 GFLOP in this")
    (one,) = [line for line in lines if line.startswith("profile")]
    assert one.split("  ")[0] == "profile"
    assert all(text in one for text in ("one 1.2", "500 MMAC", "50.0%", "no attention"))
    (three,) = [line for line in lines if line.startswith("measure")]
    assert three.endswith("failed: TypeError: no")
    assert (
        lines[-1]
        == "not installed: two, thop (pip install two; thop or ultralytics-thop, not both)"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "124n"], "size '124n' is not known; did you mean 124m?"),
        (["--recipe", "vit", "--sequence-length", "9"], "sequence-length is 9"),
        (["--sequence-length", "65"], "sequence-length 65 is longer than"),
        (["--sizes", "124m"], "--sizes is not an option"),
    ],
)
def test_what_the_recipe_refuses_is_refused_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["counters", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
