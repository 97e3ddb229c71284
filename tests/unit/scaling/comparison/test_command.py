"""Tests what a comparison prints, and its exit codes."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from scaling.__main__ import main
from scaling.comparison import command, interleave
from scaling.comparison.command import compare_losses, render
from scaling.comparison.interleave import Side, Start, judge_starts
from scaling.comparison.options import CompareOptions
from scaling.comparison.verdict import format_judgement, inconclusive
from tests.builders.pairs import make_start
from unitransformer.launch.signals import STOPPED_EXIT_CODE

SIDES = {
    "base": {"label": "old", "commit": "0123456789abcdef", "is_dirty": False},
    "candidate": {"label": ".", "commit": "0123456789abcdef", "is_dirty": True},
}


def rendered(starts: Sequence[Start]) -> dict[str, str]:
    """Returns the lines by their first word."""
    lines = render(SIDES, starts, judge_starts(starts), "processor")
    return {line.split()[0]: line for line in lines}


def test_the_answer_comes_first() -> None:
    starts = [make_start(20, 0.1, seed) for seed in range(8)]
    lines = render(SIDES, starts, judge_starts(starts), "processor")
    assert lines[0].startswith("SLOWER: 1.")
    assert lines[0].endswith(" 99 %), 160 pairs, processor time")


def test_what_was_compared_is_printed() -> None:
    lines = rendered([make_start(20, 0.1, seed) for seed in range(8)])
    assert lines["base"] == "base        old (commit 0123456789)"
    assert lines["candidate"] == "candidate   . (commit 0123456789 with uncommitted changes)"
    assert lines["memory"].startswith("memory      1.000x: 1.00 GiB, then 1.00 GiB; peak of")
    assert lines["wall"].endswith("wall time")
    assert "8 starts of both; cpu; python 3.11.7, torch 2.13.0" in lines["measured"]
    assert lines["finds"].startswith("finds       slowdowns from ")


def test_builds_for_other_devices_are_printed() -> None:
    starts = [make_start(20, builds=("CPU", "CUDA 13.0")) for _ in range(4)]
    lines = rendered(starts)
    assert lines["builds"] == (
        "builds      torch 2.13.0 is a CPU build, 2.13.0 a CUDA 13.0 build: the ratio is that of "
        "both the versions and the builds"
    )
    assert "torch build CPU and CUDA 13.0" in lines["measured"]
    assert "builds" not in rendered([make_start(20) for _ in range(4)])


def test_an_inconclusive_comparison_says_why_and_what_would_decide() -> None:
    lines = rendered([make_start(80, 0.03, 3)])
    assert lines["INCONCLUSIVE:"].endswith("time: only 1 start, and a verdict takes 4")
    assert "finds" not in lines
    assert "pairs would decide: --pairs" in lines["more"]


def test_conditions_that_differ_are_the_answer() -> None:
    assert format_judgement(inconclusive("other devices"), "gpu") == "INCONCLUSIVE: other devices"


def test_losses_are_compared_step_by_step() -> None:
    def losses(base: list[float], candidate: list[float]) -> str:
        return compare_losses([make_start(3, losses=(base, candidate))])

    nan = float("nan")
    assert losses([2.0, nan], [2.0, nan]) == "equal to the last digit in 2 micro-batches"
    assert losses([2.0, 2.0, 1.0], [2.0, 2.5, 2.0]) == (
        "differ from micro-batch 2 on, there by 5.0e-01; at most by 1.0e+00 of the loss"
    )
    assert losses([1.0], [1.0, 2.0]) == "not comparable: 1 and 2 micro-batches"


@pytest.mark.parametrize(
    ("slowdown", "code", "word"),
    [(0.0, 0, "NOT SLOWER"), (0.1, 4, "SLOWER"), (-0.3, 5, "FASTER"), (0.01, 3, "INCONCLUSIVE")],
)
def test_each_verdict_has_its_exit_code(
    slowdown: float,
    code: int,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    side = Side(label="", recipe="gpt", arguments=(), code=tmp_path, python=tmp_path)
    sides = dict.fromkeys(SIDES, side)
    monkeypatch.setattr(command, "open_sides", lambda options: nullcontext(sides))
    monkeypatch.setattr(
        interleave,
        "run_start",
        lambda sides, pairs, *, seed, clock: make_start(pairs, slowdown, seed),
    )
    out = tmp_path / "comparison.json"
    pairs = "160" if code == 3 else "320"
    arguments = ["compare", "", "--seed 1", "--pairs", pairs, "--out", str(out)]
    assert main(arguments) == code
    printed = capsys.readouterr().out
    assert f"\n{word}: " in printed
    assert main(["compare", "--reread", str(out)]) == code  # the same lines, without the progress
    assert printed.endswith(capsys.readouterr().out)


def test_a_signal_ends_a_comparison_after_its_folders_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    removed: list[bool] = []

    @contextmanager
    def folders(options: CompareOptions) -> Iterator[None]:
        try:
            yield
        finally:
            removed.append(True)

    monkeypatch.setattr(command, "open_sides", folders)
    monkeypatch.setattr(
        command, "compare_sides", lambda *_, **options: signal.raise_signal(signal.SIGTERM)
    )
    assert main(["compare", "", "--seed 1"]) == STOPPED_EXIT_CODE
    assert removed == [True]
    assert capsys.readouterr().err.startswith("error: stopped by SIGTERM before the end")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "HEAD"], "compare needs BASE and CANDIDATE"),
        (["compare", "no-such-revision", "."], "'no-such-revision' is no revision"),
        (["compare", "--reread", "nowhere.json"], "nowhere.json cannot be read: No such file"),
        (["compare", "tests", "tests/"], "are the same folder of records; name another"),
        (["compare", "HEAD", ".", "--dirty"], "dirty is only for two revisions; leave --dirty out"),
        (["compare", "", "--seed 1", "--dirty"], "dirty is only for two revisions"),
        (["compare", "", "--seed 1", "--index-url", "x"], "--index-url=x is not used, as nothing"),
        (["compare", "tests", "scaling", "--pairs", "160"], "--pairs is not used: folders of"),
        (["compare", "tests", "scaling", "--seed", "1"], "--seed is not used: folders of records"),
        (["compare", "a", "b", "--threshold", "yes"], "threshold is 'yes'; it must be a number"),
        (["compare", "a", "b", "--threshold=no"], "threshold is 'no'; it must be a number"),
        (["compare", "--self-test", "--trials", "5"], "trials is 5; fewer than 20 prove nothing"),
        (["compare", "HEAD", ".", "--", "--devices", "4"], "devices after -- is 4"),
        (["compare", "tests", "scaling", "--plot", "a.svg"], "folders of records hold no pairs"),
        (["compare", "tests", "scaling", "--clock", "wall"], "folders of records are not measured"),
        (
            ["compare", "tests", "scaling", "--", "--seed", "1"],
            "leave --clock and the options after",
        ),
        (["compare", "--self-test", "HEAD"], "--self-test does not use BASE (HEAD); leave it out"),
        (["compare", "--self-test", "--", "gpt"], "--self-test does not use the recipe after --"),
        (["compare", "--self-test", "--pairs", "80"], "--self-test does not use --pairs (80)"),
        (["compare", "--reread", "a.json", "--out", "b.json"], "--reread does not use --out"),
        (["compare", "--reread", "a.json", "--dirty"], "--reread does not use --dirty (True)"),
        (["compare", "HEAD", ".", "--trials", "80"], "trials is 80, which is of the self-test"),
        (["compare", "--reread", "a.json", "--plot", "a.pdf"], "plot a.pdf must end in .png or"),
    ],
)
def test_bad_input_is_one_line_and_never_a_pass(
    arguments: list[str],
    message: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repository)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
