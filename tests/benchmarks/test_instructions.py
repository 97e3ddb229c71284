"""Instructions of training steps equal their baseline within 0.2 %, where valgrind is installed.

`make bench-instructions` counts them; `--update-baseline` beside it writes the baseline.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.comparison.pytest_plugin import Inconclusive
from tests.benchmarks import instructions
from tests.benchmarks.counting import HERE

BASELINE = HERE / "instructions.json"


@pytest.mark.proof  # two minutes of one core, under valgrind
@pytest.mark.timeout(instructions.LIMIT_S)
def test_instructions_of_training_steps_equal_their_baseline(
    updates_baseline: bool,
    without_baseline: Callable[[str], None],
    repository: Path,
    tmp_path: Path,
) -> None:
    if missing := instructions.why_not_countable():
        without_baseline(missing)
    before: instructions.Instructions = {}
    if not updates_baseline:
        if not BASELINE.exists():
            without_baseline(f"no instructions for {HERE.name}; --update-baseline writes them")
        before = stored(without_baseline)
    now = instructions.count_instructions(repository, tmp_path)
    if updates_baseline:
        instructions.write_instructions(now, BASELINE)
        return
    print({recipe: f"{sum(counts.values()):,}" for recipe, counts in now.items()})
    assert instructions.differences(before, now) == []


def stored(without_baseline: Callable[[str], None]) -> instructions.Instructions:
    """The baseline, if it was counted with the versions that are installed here."""
    try:
        conditions, counted = instructions.load_instructions(BASELINE)
    except ValueError as error:
        raise Inconclusive(f"{error}; restore it, or --update-baseline") from None
    here = instructions.conditions()
    if others := [
        f"{name} {conditions.get(name)}, here {here[name]}"
        for name in here
        if conditions.get(name) != here[name]
    ]:
        without_baseline(f"{BASELINE.name} was counted with {'; '.join(others)}")
    return counted


FORMAT = """\
events: Ir

ob=(1) /usr/lib/libtorch_cpu.so
fn=(1) gemm
10 700
+1 50
cob=(2) /usr/lib/libc.so.6
cfn=(2) memcpy
calls=3 20
* 999

ob=(2)
fn=(2)
20 30
"""


def test_instructions_are_summed_by_library_without_those_of_callees() -> None:
    expected = {"libtorch_cpu.so": 750, "libc.so.6": 30}
    assert instructions.by_library(FORMAT.splitlines()) == expected


def test_a_change_within_the_tolerance_is_none() -> None:
    before = {"gpt": {"libtorch_cpu.so": 100_000}}
    assert instructions.differences(before, {"gpt": {"libtorch_cpu.so": 100_050}}) == []


def test_more_and_fewer_instructions_are_both_reported_with_their_library() -> None:
    before = {"gpt": {"libtorch_cpu.so": 99_000, "libc.so.6": 1_000}}
    more = {"gpt": {"libtorch_cpu.so": 99_000, "libc.so.6": 2_000}}
    (line,) = instructions.differences(before, more)
    assert line.startswith("gpt: 100,000 -> 101,000 instructions (+1.00%) in libc.so.6 +1,000")
    assert "-0.99%" in instructions.differences(more, before)[0]


@pytest.mark.parametrize(
    "text", ["", "{}", '{"conditions": {}, "instructions": {"bert": {"libc.so.6": 1}}}', "[1]"]
)
def test_a_damaged_baseline_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "instructions.json").write_text(text)
    with pytest.raises(ValueError, match=r"instructions\.json is damaged"):
        instructions.load_instructions(tmp_path / "instructions.json")


def test_a_missing_baseline_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"instructions\.json is missing"):
        instructions.load_instructions(tmp_path / "instructions.json")
