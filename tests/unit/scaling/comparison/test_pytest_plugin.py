"""The fixture `paired_benchmark` in projects that are not this one."""

import pytest

from scaling.comparison import paired_calls
from tests.builders.clocks import FakeTime
from unitransformer.stats import autocorrelation  # noqa: F401  (numpy cannot be loaded again)

pytest_plugins = "pytester"
PLUGIN = ("-p", "scaling.comparison.pytest_plugin")
FUNCTIONS = """
import random
from scaling.comparison import paired_calls

noise = random.Random(1)

def work(seconds):
    return lambda: paired_calls.time.work(seconds * noise.uniform(0.99, 1.01))
"""


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take longer than the tests
    monkeypatch.setattr(paired_calls, "time", FakeTime())


def run(pytester: pytest.Pytester, *tests: str) -> pytest.RunResult:
    """Runs tests, each given by its body, in a project without settings."""
    bodies = [
        f"def test_{number}(paired_benchmark):\n    {body}" for number, body in enumerate(tests)
    ]
    pytester.makepyfile("\n".join([FUNCTIONS, *bodies]))
    return pytester.runpytest(*PLUGIN, "-p", "no:cacheprovider")


def test_a_candidate_as_fast_as_its_base_passes(pytester: pytest.Pytester) -> None:
    done = run(pytester, "assert paired_benchmark(work(1), work(1)).pairs == 80")
    assert done.ret == 0
    done.stdout.fnmatch_lines(
        ["*::test_0 *NOT SLOWER: 1.00*x (* to 1.0*), 80 pairs, processor time *slowdowns from *%"]
    )


def test_a_slower_candidate_fails_with_its_change(pytester: pytest.Pytester) -> None:
    done = run(pytester, "paired_benchmark(work(1), work(1.05))")
    assert done.ret == 1
    done.stdout.fnmatch_lines(
        ["SLOWER: 1.050x (*), 80 pairs, processor time; a slowdown of 2.0% must not pass"]
    )
    done.assert_outcomes(failed=1)


def test_a_slowdown_below_the_threshold_passes(pytester: pytest.Pytester) -> None:
    assert run(pytester, "paired_benchmark(work(1), work(1.05), threshold=0.2)").ret == 0


def test_a_much_faster_candidate_fails_because_its_base_is_stale(
    pytester: pytest.Pytester,
) -> None:
    done = run(pytester, "paired_benchmark(work(1), work(0.7))")
    assert done.ret == 1
    done.stdout.fnmatch_lines(["FASTER: 0.700x (*; the base is stale: *"])


def test_without_a_verdict_the_exit_code_is_6(pytester: pytest.Pytester) -> None:
    done = run(
        pytester,
        "paired_benchmark(work(1), work(1), pairs=20)",
        "paired_benchmark(work(1), work(1))",
    )
    assert done.ret == 6
    outcomes = done.parseoutcomes()
    assert (outcomes["inconclusive"], outcomes["passed"]) == (1, 1)
    done.stdout.fnmatch_lines(
        ["*no verdict (exit code 6)*", "*::test_0: INCONCLUSIVE: * 20 pairs, * 20, *50 pairs"]
    )


def test_a_failure_outweighs_a_test_without_a_verdict(pytester: pytest.Pytester) -> None:
    done = run(pytester, "paired_benchmark(work(1), work(1), pairs=20)", "assert False")
    assert done.ret == 1


def test_a_test_that_compares_nothing_has_no_verdict(pytester: pytest.Pytester) -> None:
    done = run(pytester, "pass")
    assert done.ret == 6
    done.stdout.fnmatch_lines(["*::test_0: * paired_benchmark and compared nothing"])


XFAIL = "@__import__('pytest').mark.xfail"


@pytest.mark.parametrize("body", ["pass", "paired_benchmark(work(1), work(1), pairs=20)"])
@pytest.mark.parametrize(("other", "code"), [("pass", 6), ("assert False", 1)])
def test_a_test_that_may_fail_has_no_verdict_either(
    other: str, code: int, body: str, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(
        f"{FUNCTIONS}\n{XFAIL}\ndef test_0(paired_benchmark):\n    {body}\n"
        f"def test_1():\n    {other}\n"
    )
    done = pytester.runpytest(*PLUGIN, "-p", "no:cacheprovider")
    assert done.ret == code
    assert done.parseoutcomes()["inconclusive"] == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("3, work(1)", "base is 3; give a function*"),
        ("work(1), None", "candidate is None; give a function*"),
        ("work(1), work(1), pairs=0", "pairs is 0; give a number, such as 320"),
        ("work(1), work(1), threshold=-0.1", "threshold is -0.1; give a share above 0*"),
        ("work(1), work(1), clock='cpu'", "clock is 'cpu'; choose one of processor, gpu, wall"),
        ("work(1), work(1), clock='gpu'", "clock is 'gpu', but neither function*"),
        (
            "lambda: paired_calls.time.sleep(1), work(1)",
            "the functions mostly wait: *; give clock='wall'",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    arguments: str, expected: str, pytester: pytest.Pytester
) -> None:
    done = run(pytester, f"paired_benchmark({arguments})")
    assert done.ret == 1
    done.stdout.fnmatch_lines([f"E *ValueError: {expected}"])


def test_another_project_uses_it_without_torch(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, repository: object
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(
        """
        import sys
        from scaling.comparison import paired_calls

        seconds = 0.0

        def work(duration):
            def call():
                global seconds
                seconds += duration
            return call

        def test_a_step(paired_benchmark, monkeypatch):
            monkeypatch.setattr(paired_calls.time, "process_time", lambda: seconds)
            assert "torch" not in sys.modules
            paired_benchmark(work(0.010), work(0.011))
        """
    )
    done = pytester.runpytest_subprocess(*PLUGIN)
    assert done.ret == 1
    done.stdout.fnmatch_lines(["SLOWER: 1.100x*", "*::test_a_step *SLOWER: 1.100x*processor time*"])
