"""Shows step times beside stored ones, and keeps pytest-benchmark's gate from passing on nothing.

Times that were stored are those of another hour: on a machine that is shared they differ by more
than the slowdowns that a gate looks for. So a gate on them (`--benchmark-compare-fail`) only finds
suspects, which a comparison in pairs has to judge. Suspects, and whatever could not be compared,
end the session with exit code 6. A run that did not pass is never stored.
"""

from collections.abc import Iterator

import pytest
from pytest_benchmark.session import BenchmarkSession
from pytest_benchmark.storage.file import FileStorage

from scaling.comparison.pytest_plugin import OUTCOMES, Outcomes

OTHER_MACHINE = pytest.StashKey[str]()  # whose times are stored here
LINES = pytest.StashKey[list[str]]()  # for the end of the session
STORED = "[0-9][0-9][0-9][0-9]_"  # the files among which pytest-benchmark takes the last
PROOF = "stored times prove nothing: compare in pairs, see make bench-check"


@pytest.hookimpl(wrapper=True, tryfirst=True)  # pytest-benchmark stores, then compares
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    times: BenchmarkSession | None = getattr(session.config, "_benchmarksession", None)
    if times is not None:
        lines = _compare(session.config, times)
        has_passed = session.exitstatus == pytest.ExitCode.OK
        if times.compare_fail:
            outcomes: Outcomes = session.config.pluginmanager.get_plugin(OUTCOMES)
            outcomes.reasons += lines
            has_passed = has_passed and not lines
            lines = []
            times.compare_fail = []  # it would raise an exception
        if (times.save or times.autosave) and not has_passed:
            times.save = times.autosave = None
            lines.append("these times are not stored: the run did not pass")
        session.config.stash[LINES] = lines
    return (yield)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for line in config.stash.get(LINES, []):
        terminalreporter.write_line(line)


def _compare(config: pytest.Config, times: BenchmarkSession) -> list[str]:
    """Returns what was not compared, and what is suspect, a line each."""
    if times.compare_fail and not times.compare:
        return ["--benchmark-compare-fail compares nothing without --benchmark-compare"]
    if not times.compare:
        return []
    if times.skip:
        return ["--benchmark-skip: nothing was measured, so nothing is compared"]
    if times.disabled:
        return ["--benchmark-disable or pytest-xdist: nothing was measured, so nothing is compared"]
    if damaged := _find_damaged(times):
        return [f"{name} is damaged, remove it: nothing is compared" for name in damaged]
    if not times.compared_mapping:
        return [
            f"{times.storage}: no times of this machine to compare with; make bench stores some"
        ]
    if OTHER_MACHINE in config.stash:
        other = config.stash[OTHER_MACHINE]
        return [f"stored times of another machine ({other}): nothing is compared"]
    return [*_find_missing(times), *_find_suspects(times)]


def _find_damaged(times: BenchmarkSession) -> list[str]:
    """Returns stored files that were to be compared and that pytest-benchmark passed over."""
    if not isinstance(times.storage, FileStorage):
        return []
    files = times.storage.query(STORED if times.compare is True else times.compare)
    files = files[-1:] if times.compare is True else files
    read = {times.storage.path / path for path in times.compared_mapping}
    return [str(path) for path in files if path not in read]


def _find_missing(times: BenchmarkSession) -> Iterator[str]:
    measured = {result.fullname for result in times.benchmarks if not result.has_error}
    for path, stored in times.compared_mapping.items():
        if missing := stored.keys() - measured:
            names = ", ".join(sorted(missing))
            yield f"stored in {path} and not measured (renamed, removed, not selected): {names}"
        if new := measured - stored.keys():
            yield f"measured and not stored in {path} (new or renamed): {', '.join(sorted(new))}"


def _find_suspects(times: BenchmarkSession) -> Iterator[str]:
    for path, stored in times.compared_mapping.items():
        for result in times.benchmarks:
            if result.fullname not in stored or result.has_error:
                continue
            before = stored[result.fullname]["stats"]
            for check in times.compare_fail or ():
                if check.field not in before:
                    yield f"{path} has no {check.field} of {result.fullname}"
                elif check.fails(result, before):
                    now, then = result[check.field], before[check.field]
                    change = f"{check.field} {now:.4g} after {then:.4g}"
                    yield f"suspect: {result.fullname}, {change} in {path}; {PROOF}"
