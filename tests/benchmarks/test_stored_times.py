"""Stored times find suspects only, and a run that did not pass is never stored."""

from pathlib import Path

import pytest

pytest_plugins = "pytester"
PLUGINS = (
    "pytest_benchmark.plugin",
    "scaling.comparison.pytest_plugin",
    "tests.benchmarks.stored_times",
)
GATE = ("--benchmark-compare", "--benchmark-compare-fail=median:5%")
STEP = """
import itertools

def test_{name}(benchmark):
    clock = map(float, itertools.count(0, {seconds}))
    benchmark._timer = lambda: next(clock)
    benchmark.pedantic(lambda: None, rounds=5)
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project that has stored a step of one second."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert bench(pytester, 1, "--benchmark-autosave").ret == 0
    assert len(stored(pytester)) == 1
    return pytester


def bench(
    project: pytest.Pytester, seconds: int, *options: str, name: str = "step", more: str = ""
) -> pytest.RunResult:
    project.makepyfile(test_times=STEP.format(name=name, seconds=seconds) + more)
    plugins = [word for plugin in PLUGINS for word in ("-p", plugin)]
    return project.runpytest(*plugins, "-p", "no:cacheprovider", *options)


def stored(project: pytest.Pytester) -> list[Path]:
    return sorted(project.path.glob(".benchmarks/*/*.json"))


def test_a_run_as_fast_as_the_stored_one_passes_and_is_stored(project: pytest.Pytester) -> None:
    assert bench(project, 1, *GATE, "--benchmark-autosave").ret == 0
    assert len(stored(project)) == 2


def test_a_slower_run_is_suspect_however_often_it_is_repeated(project: pytest.Pytester) -> None:
    for _ in range(2):
        done = bench(project, 2, *GATE, "--benchmark-autosave")
        assert done.ret == 6
        done.stdout.fnmatch_lines(
            [
                "suspect: test_times.py::test_step, median 2 after 1 in *; * compare in pairs*",
                "these times are not stored: the run did not pass",
            ]
        )
        assert len(stored(project)) == 1


def test_without_a_gate_a_slower_run_is_only_shown(project: pytest.Pytester) -> None:
    assert bench(project, 2, "--benchmark-compare", "--benchmark-autosave").ret == 0
    assert len(stored(project)) == 2


def test_a_renamed_benchmark_is_no_pass(project: pytest.Pytester) -> None:
    done = bench(project, 1, *GATE, name="other")
    assert done.ret == 6
    done.stdout.fnmatch_lines(
        [
            "stored in *not measured*: test_times.py::test_step",
            "measured and not stored*::test_other",
        ]
    )


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--benchmark-disable", "--benchmark-disable or pytest-xdist: nothing was measured*"),
        ("--benchmark-skip", "--benchmark-skip: nothing was measured*"),
        ("--deselect=test_times.py::test_step", "stored in *not measured*::test_step"),
    ],
)
def test_a_benchmark_that_is_not_measured_is_no_pass(
    option: str, expected: str, project: pytest.Pytester
) -> None:
    done = bench(project, 1, *GATE, option, more="def test_nothing(): pass\n")
    assert done.ret == 6
    done.stdout.fnmatch_lines([expected])


@pytest.mark.parametrize("text", ["", "{}", '{"benchmarks": [{"stats": {}}]}'])
def test_damaged_times_are_no_pass(text: str, project: pytest.Pytester) -> None:
    (path,) = stored(project)
    newer = path.with_name("0002_damaged.json")
    newer.write_text(text)
    done = bench(project, 1, *GATE, "--benchmark-autosave")
    assert done.ret == 6
    done.stdout.fnmatch_lines([f"{newer} is damaged, remove it: nothing is compared"])
    assert stored(project) == [path, newer]


def test_a_gate_without_stored_times_is_no_pass(project: pytest.Pytester) -> None:
    stored(project)[0].unlink()
    done = bench(project, 1, *GATE)
    assert done.ret == 6
    done.stdout.fnmatch_lines(
        ["*: no times of this machine to compare with; make bench stores some"]
    )


def test_a_gate_without_a_comparison_is_no_pass(project: pytest.Pytester) -> None:
    assert bench(project, 1, GATE[1]).ret == 6


def test_times_beside_a_failed_test_are_not_stored(project: pytest.Pytester) -> None:
    failing = "def test_wrong(): assert False\n"
    assert bench(project, 1, "--benchmark-autosave", more=failing).ret == 1
    assert len(stored(project)) == 1
