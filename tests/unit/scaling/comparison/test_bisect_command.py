"""The command: options, stored pairs, what is printed, and a real bisection as the long proof."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from scaling.__main__ import main
from scaling.comparison import bisect_command, counters
from scaling.comparison.interleave import Blocks, Side, SideFailed, Start
from scaling.comparison.verdict import Judgement
from tests.benchmarks.counting import busy
from tests.builders.revisions import OPERATOR, SLOWER, commit, copy_project, git, make_repository

NUMBER = 16
ABOUT = {"versions": {"torch": "2.13.0"}, "device": "cpu", "clock": "processor"}
TINY = shlex.split(
    "gpt --data synthetic --accelerator cpu --strategy single --precision 32-true --batch-size 20 "
    "--model.width 64 --model.num-layers 2 --model.num-heads 4 --model.feedforward-width 256 "
    "--model.num-classes 512 --model.num-positions 64"
)


class FakeSides:
    """Commits whose step takes as long as the file `seconds` says; an empty one does not train."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    @contextlib.contextmanager
    def open(
        self, names: Sequence[str], recipe: str, arguments: Sequence[str], pip_options: object
    ) -> Iterator[Any]:
        yield [
            Side(
                label=name,
                recipe="gpt",
                arguments=tuple(arguments),
                code=Path(git(Path.cwd(), "show", f"{name}:seconds") or "/nowhere"),
                python=Path(sys.executable),
            )
            for name in names
        ]

    def compare(
        self, sides: dict[str, Side], looks: Any, **how: Any
    ) -> tuple[list[Start], Judgement | None]:
        self.measured.append(sides["candidate"].label)
        base, candidate = (str(sides[name].code) for name in ("base", "candidate"))
        if candidate == "/nowhere":
            raise SideFailed(f"{sides['candidate'].label}: it does not train")
        starts = [
            Start(
                steps_per_block=1,
                first=("base",) * 20,
                base=_blocks(float(base), start),
                candidate=_blocks(float(candidate), start + 5),
                about={"base": ABOUT, "candidate": ABOUT},
            )
            for start in range(8)
        ]
        return starts, None

    def count(self, side: Side) -> dict[str, dict[str, int]]:
        return {"flops": {"layer": round(1000 * float(str(side.code)))}}


def _blocks(seconds: float, phase: int) -> Blocks:
    times = [seconds * (1 + 0.001 * ((7 * i + phase) % 11)) for i in range(20)]
    return Blocks(processor_s=times, wall_s=list(times), losses=[], peak_bytes=1)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of 16 commits of which number 9 is 5 % slower."""
    repository = make_repository(tmp_path_factory.mktemp("template") / "repository")
    for package in ("unitransformer", "recipes"):
        (repository / package).mkdir()
        (repository / package / "__init__.py").touch()
    for number in range(NUMBER):
        (repository / "seconds").write_text("1.05" if number >= 9 else "1.0")
        commit(repository, f"commit {number}")
    return repository


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, template: Path) -> FakeSides:
    """A copy of the repository is the current folder, and training is fake."""
    shutil.copytree(template, tmp_path / "repository")
    monkeypatch.chdir(tmp_path / "repository")
    fake = FakeSides()
    monkeypatch.setattr(bisect_command, "open_revisions", fake.open)
    monkeypatch.setattr(bisect_command, "compare_sides", fake.compare)
    monkeypatch.setattr(bisect_command, "count_side", fake.count)
    return fake


def _short(text: str) -> str:
    return git(Path.cwd(), "rev-parse", "--short", text)


def test_the_culprit_is_named_with_its_ratio_interval_and_counters(
    sides: FakeSides, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bisect", "HEAD~15", "HEAD", "--out", "../out"]) == 4
    printed = capsys.readouterr().out
    assert f"Culprit: {_short('HEAD~6')} commit 9" in printed
    assert f"{_short('HEAD~6')} against {_short('HEAD~7')}: SLOWER: 1.05" in printed
    assert "flops grew: 1,000 -> 1,050 (+50, +5.00%) at layer +50" in printed
    assert "14 left, about 4 to measure" in printed
    assert len(sides.measured) == 6


def test_a_culprit_that_cannot_be_confirmed_is_still_named(
    sides: FakeSides, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(pair: dict[str, Side], looks: Any, **how: Any) -> Any:
        if pair["base"].label != git(Path.cwd(), "rev-parse", "HEAD~15"):
            raise SideFailed("out of memory")
        return FakeSides.compare(sides, pair, looks, **how)

    monkeypatch.setattr(bisect_command, "compare_sides", compare)
    assert main(["bisect", "HEAD~15", "HEAD", "--out", "../out"]) == 4
    printed = capsys.readouterr().out
    assert f"Culprit: {_short('HEAD~6')} commit 9" in printed
    assert f"against {_short('HEAD~7')} cannot be measured: out of memory" in printed
    assert "This step alone is not certainly slower" not in printed  # nobody judged it


def test_the_same_command_goes_on_from_the_stored_pairs(
    sides: FakeSides, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bisect", "HEAD~15", "HEAD", "--out", "../out"]
    main(command)
    first, number = capsys.readouterr().out, len(sides.measured)
    (Path("../out") / sorted(os.listdir("../out"))[-1]).write_text("{")  # a damaged file
    main(command)
    assert capsys.readouterr().out == first
    assert len(sides.measured) == number + 1


def test_a_stopped_bisection_keeps_what_it_measured_and_the_repository_as_it_was(
    sides: FakeSides, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = sides.compare

    def interrupted(*arguments: Any, **how: Any) -> Any:
        if len(sides.measured) == 2:
            raise KeyboardInterrupt
        return compare(*arguments, **how)

    monkeypatch.setattr(bisect_command, "compare_sides", interrupted)
    state = [
        git(Path.cwd(), *q.split()) for q in ("status --porcelain", "for-each-ref", "stash list")
    ]
    assert main(["bisect", "HEAD~15", "HEAD", "--out", "../out"]) == 1
    assert "the same command continues" in capsys.readouterr().out
    assert len(list(Path("../out").glob("pairs-*"))) == 2
    assert state == [
        git(Path.cwd(), *q.split()) for q in ("status --porcelain", "for-each-ref", "stash list")
    ]
    monkeypatch.setattr(bisect_command, "compare_sides", compare)
    assert main(["bisect", "HEAD~15", "HEAD", "--out", "../out"]) == 4
    assert len(sides.measured) == 6


def test_a_bad_that_is_as_fast_as_good_is_nothing_to_bisect(
    sides: FakeSides, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bisect", "HEAD~15", "HEAD~7", "--out", "../out"]) == 0
    printed = capsys.readouterr().out
    assert "Nothing to bisect: BAD is not slower than GOOD; NOT SLOWER: 1.0" in printed
    assert main(["bisect", "HEAD~15", "HEAD~7", "--by", "counters", "--out", "../out"]) == 0
    assert "counters of one step of GOOD and BAD are equal" in capsys.readouterr().out


def test_commits_that_do_not_train_are_named(
    sides: FakeSides, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("seconds").write_text("")
    commit(Path.cwd(), "broken")
    Path("seconds").write_text("1.2")
    commit(Path.cwd(), "slow")
    assert main(["bisect", "HEAD~2", "HEAD", "--out", "../out"]) == 4
    printed = capsys.readouterr().out
    assert "The culprit is one of 2" in printed
    assert "1 candidate was skipped:" in printed
    assert "it does not train" in printed


def test_an_end_that_does_not_train_is_an_error_of_its_own(
    sides: FakeSides, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("seconds").write_text("")
    commit(Path.cwd(), "broken")
    assert main(["bisect", "HEAD~2", "HEAD", "--out", "../out"]) == 1
    assert "GOOD or BAD cannot be measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "bisect needs GOOD and BAD"),
        ("HEAD HEAD", "are the same commit"),
        ("HEAD HEAD~3", "swap them, as bisect HEAD~3 HEAD"),
        ("mainx HEAD", "'mainx' is no revision of this repository; did you mean main?"),
        ("HEAD~1 HEAD --threshold 0", "threshold is 0; give a share between 0 and 1"),
        ("HEAD~1 HEAD --pairs 100", "pairs is 100; a verdict needs at least 160"),
        ("HEAD~1 HEAD --by speed", "by"),
        ("HEAD~1 HEAD -- gtp", "gtp after -- is not a recipe; did you mean gpt?"),
        ("HEAD~1 HEAD -- gpt --max-steps 3", "--max-steps after -- is decided by the comparison"),
        ("--package torch", "give two or more versions, as torch==2.12.0,2.13.0"),
        ("--package torch==2.12.0,2.13.0,2.12.0", "names 2.12.0 twice"),
        ("--package torch==2.12.0,latest", "but 'latest' is no version; give numbers"),
        ("HEAD --package torch==2.12.0,2.13.0", "already says what is compared"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    sides: FakeSides, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(["bisect", *shlex.split(arguments)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not sides.measured


def test_stored_versions_hold_for_the_files_that_trained_with_them(
    sides: FakeSides, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []

    @contextlib.contextmanager
    def open_versions(package: str, names: Sequence[str], *arguments: Any) -> Iterator[Any]:
        with sides.open(["HEAD"], "gpt", (), ()) as opened:
            counted.extend(f"{package} {name}" for name in names)
            yield opened * len(names)

    monkeypatch.setattr(bisect_command, "open_versions", open_versions)
    command = ["bisect", "--package", "torch==2.12.0,2.13.0", "--by", "counters", "--out", "../out"]
    for _ in range(2):
        assert main(command) == 0
        assert counted == ["torch 2.12.0", "torch 2.13.0"]
    Path("recipes/__init__.py").write_text("changed = True")
    assert main(command) == 0
    assert len(counted) == 4
    # Another source may have another build of the same version.
    assert main([*command, "--index-url", "https://index.example"]) == 0
    assert len(counted) == 6
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example")
    assert main(command) == 0
    assert len(counted) == 8


def test_several_devices_are_counted_and_not_timed(
    sides: FakeSides, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bisect", "HEAD~15", "HEAD", "--out", "../out"]
    options = ["--", "gpt", "--devices", "2"]
    assert main([*command, "--by", "counters", *options]) == 4
    assert f"Counters changed with {_short('HEAD~6')} commit 9:" in capsys.readouterr().out
    assert main([*command, *options]) == 2
    assert "devices after -- is 2" in capsys.readouterr().err


def test_a_renamed_module_is_no_change_of_work() -> None:
    assert counters.changed_work({"flops": {"a": 5}}, {"flops": {"b": 5}}) == []
    assert counters.changed_work({"flops": {"a": 5}}, {"flops": {"b": 6}}) == [
        "flops grew: 5 -> 6 (+1, +20.00%) at b +6, a -5"
    ]
    before, now = {"operator_names": {"mm": 1}}, {"operator_names": {"bmm": 1}}
    assert len(counters.changed_work(before, now)) == 1


def _run_real(repository: Path, arguments: Sequence[str], code: Path) -> str:
    """Bisects as a user does, with this project's `scaling` and the commits of `repository`."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "scaling", "bisect", *arguments, "--", *TINY],
        cwd=repository,
        # Threads that wait for each other beside other processes add to processor time.
        env={**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4, done.stdout + done.stderr
    return done.stdout


@pytest.mark.proof
@pytest.mark.alone
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("at", [3, 8, 14])
def test_5_percent_more_flops_are_found_among_16_commits_beside_busy_processes(
    at: int, tmp_path: Path, repository: Path
) -> None:
    folder = tmp_path / "repository"
    commits = copy_project(repository, folder, planted=SLOWER, at=at, number=NUMBER)
    with busy(2):
        printed = _run_real(folder, [commits[0], commits[-1], "--out", "../out"], repository)
    assert f"Culprit: {git(folder, 'rev-parse', '--short', commits[at])} Commit {at}" in printed
    assert "flops grew" in printed


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_a_planted_operator_is_found_among_16_commits_by_counters_alone(
    tmp_path: Path, repository: Path
) -> None:
    folder = tmp_path / "repository"
    commits = copy_project(repository, folder, planted=OPERATOR, at=10, number=NUMBER)
    ends = [commits[0], commits[-1], "--by", "counters", "--out", "../out"]
    printed = _run_real(folder, ends, repository)
    name = git(folder, "rev-parse", "--short", commits[10])
    assert f"Counters changed with {name} Commit 10:" in printed
    assert "aten::neg +1" in printed
