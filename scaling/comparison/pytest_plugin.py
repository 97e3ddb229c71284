"""A plugin of pytest: the fixture `paired_benchmark` fails a test whose candidate is slower.

    pytest -p scaling.comparison.pytest_plugin

    def test_the_new_norm_is_not_slower(paired_benchmark):
        paired_benchmark(old_norm, new_norm)

Both functions run in turn, in this process, so that whatever else the machine does affects both
alike. Stored times are never used.

A test passes if its candidate is not slower. It fails if the candidate is slower, and if it is so
much faster that the base is stale. Without a verdict it is neither: it is INCONCLUSIVE, and the
exit code of pytest is 6, unless another test failed (1).
"""

from collections.abc import Generator
from typing import cast

import pytest
from tabulate import tabulate

from scaling.comparison.paired_calls import Call, Clock, PairedCalls
from scaling.comparison.verdict import (
    LOOKS,
    STOP_FASTER,
    THRESHOLD,
    Judgement,
    Verdict,
    format_judgement,
    judge,
    judge_until_decided,
    looks_upto,
)

OK, TESTS_FAILED = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED
INCONCLUSIVE_EXIT_CODE = 6  # pytest itself uses 0 to 5
FIXTURE = "paired_benchmark"
OUTCOMES = "paired-benchmark-outcomes"  # the name of `Outcomes` among the plugins
NO_VERDICT = "no verdict"  # the property of a report that says why
Row = dict[str, object]  # cells of the table, in types that a worker of pytest-xdist can send


class Inconclusive(Exception):
    """A test has no verdict; the message says why, in one line."""


class PairedBenchmark:
    """Compares two functions, without arguments, that do the same work.

    Args:
        properties: of the test, to which the results are added.
    """

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties

    def __call__(
        self,
        base: Call,
        candidate: Call,
        *,
        threshold: float = THRESHOLD,
        stop_faster: float = STOP_FASTER,
        pairs: int = LOOKS[-1],
        clock: Clock | None = None,
    ) -> Judgement:
        """Returns the judgement if the candidate is not slower; otherwise the test ends here.

        Args:
            threshold: slowdown that must not pass, such as 0.02 for 2 %.
            stop_faster: speed-up from which on the base is stale.
            pairs: pairs to measure at most; fewer if they decide. A pair takes two blocks of at
                least 10 ms.
            clock: see `PairedCalls`.
        """
        __tracebackhide__ = True
        if type(pairs) is not int or pairs < 1:
            raise ValueError(f"pairs is {pairs!r}; give a number, such as {LOOKS[-1]}")
        judge([], [], threshold=threshold, stop_faster=stop_faster)  # refuses bad thresholds early
        calls = PairedCalls(base, candidate, clock)
        judgement = judge_until_decided(
            calls.measure, looks=looks_upto(pairs), threshold=threshold, stop_faster=stop_faster
        )
        result = format_judgement(judgement, calls.clock)
        self._properties.append((FIXTURE, {"result": result, "finds": _finds(judgement)}))
        if judgement.verdict is Verdict.INCONCLUSIVE:
            raise Inconclusive(result + _hint(judgement, threshold))
        if judgement.verdict is not Verdict.NOT_SLOWER:
            pytest.fail(result + _hint(judgement, threshold), pytrace=False)
        return judgement


@pytest.fixture
def paired_benchmark(request: pytest.FixtureRequest) -> PairedBenchmark:
    """Compares two functions in pairs; fails if the second is slower than the first."""
    return PairedBenchmark(request.node.user_properties)


def _hint(judgement: Judgement, threshold: float) -> str:
    """Returns what to do about a verdict."""
    match judgement.verdict:
        case Verdict.SLOWER:
            return f"; a slowdown of {threshold:.1%} must not pass"
        case Verdict.FASTER:
            return (
                "; the base is stale: a later slowdown of as much would pass. "
                "Make the candidate the new base"
            )
        case _:
            needed = judgement.pairs_needed
            return f"; give about {needed} pairs" if needed else ""


def _finds(judgement: Judgement) -> str:
    return "" if judgement.detectable is None else f"slowdowns from {judgement.detectable:.1%}"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(), OUTCOMES)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Marks the report of a test without a verdict, and keeps its line alone."""
    report = yield
    reason = None
    if call.excinfo is not None and call.excinfo.errisinstance(Inconclusive):
        reason = str(call.excinfo.value)
    elif report.passed and report.when == "call" and _compared_nothing(item):
        reason = f"the test has the fixture {FIXTURE} and compared nothing"
    if reason is not None:
        report.outcome, report.longrepr = "failed", reason
        vars(report).pop("wasxfail", None)  # no verdict is not the failure that xfail expects
        report.user_properties.append((NO_VERDICT, reason))
    return report


def _compared_nothing(item: pytest.Item) -> bool:
    names = {name for name, _ in item.user_properties}
    return FIXTURE in getattr(item, "fixturenames", ()) and FIXTURE not in names


def pytest_report_teststatus(
    report: pytest.CollectReport | pytest.TestReport,
) -> tuple[str, str, str] | None:
    if NO_VERDICT in dict(getattr(report, "user_properties", ())):
        return "inconclusive", "?", Verdict.INCONCLUSIVE.value
    return None


class Outcomes:
    """Collects what the tests found; gives the session its exit code, a table and the reasons.

    `reasons` says in a line each what has no verdict; other plugins may add to it.
    """

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._rows: list[dict[str, object]] = []
        self._undecided = 0  # tests

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == FIXTURE and report.when == "call":
                self._rows.append({"test": report.nodeid, **cast("Row", value)})
            elif name == NO_VERDICT:
                self._undecided += 1
                self.reasons.append(f"{report.nodeid}: {value}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        others = session.testsfailed - self._undecided
        if self.reasons and not others and session.exitstatus in (OK, TESTS_FAILED):
            session.exitstatus = INCONCLUSIVE_EXIT_CODE

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._rows:
            terminalreporter.section("times of candidates over those of their bases")
            terminalreporter.write_line(tabulate(self._rows, headers="keys", disable_numparse=True))
        if self.reasons:
            terminalreporter.section(f"no verdict (exit code {INCONCLUSIVE_EXIT_CODE})")
            for reason in self.reasons:
                terminalreporter.write_line(reason)
