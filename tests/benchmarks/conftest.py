"""Stores counter baselines in the repository, and times in one folder per machine.

What could not be compared is named in one line. It is not a pass for a run that must compare: with
`--must-compare`, or with a gate on stored times (`--benchmark-compare-fail`), its exit code is 6.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.session import BenchmarkSession

from scaling.comparison import pytest_plugin
from scaling.comparison.pytest_plugin import Inconclusive
from tests.benchmarks import stored_times
from tests.benchmarks.clock import PACKAGES, machine
from tests.benchmarks.stored_times import OTHER_MACHINE

UPDATE = "--update-baseline"
MUST_COMPARE = "--must-compare"
BASE = "--base"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        UPDATE, action="store_true", help="write the baselines of the counters instead of comparing"
    )
    parser.addoption(
        MUST_COMPARE,
        action="store_true",
        help="counters without a baseline are no pass: exit code 6 instead of a skipped test",
    )
    parser.addoption(
        BASE,
        metavar="REVISION",
        help="counted too, with its own code, where this torch or processor has no baseline",
    )


def folder_of_times() -> Path:
    """Folder of the stored times of this machine, relative to the working directory."""
    return Path(".benchmarks") / f"{machine().fingerprint}-{torch.get_num_threads()}-threads"


def pytest_configure(config: pytest.Config) -> None:
    for plugin in (pytest_plugin, stored_times):
        if not config.pluginmanager.is_registered(plugin):
            config.pluginmanager.register(plugin, plugin.__name__)
    # The default of pytest-benchmark: the user gave no other folder.
    if getattr(config.option, "benchmark_storage", None) == "file://./.benchmarks":
        config.option.benchmark_storage = f"file://./{folder_of_times()}"


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    machine_info |= {
        "unitransformer": {
            **asdict(machine()),
            "fingerprint": machine().fingerprint,
            "threads": torch.get_num_threads(),
            "versions": versions,
        }
    }


def pytest_benchmark_compare_machine_info(
    config: pytest.Config,
    benchmarksession: BenchmarkSession,
    machine_info: dict[str, Any],
    compared_benchmark: dict[str, Any],
) -> None:
    ours, theirs = (
        [info.get("unitransformer", {}).get(name) for name in ("fingerprint", "threads")]
        for info in (machine_info, compared_benchmark["machine_info"])
    )
    if ours != theirs:
        config.stash[OTHER_MACHINE] = str(theirs[0])


@pytest.fixture
def updates_baseline(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption(UPDATE, default=False))


@pytest.fixture
def without_baseline(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Ends a test that has nothing to compare with: skipped, or without a verdict."""

    def end(reason: str) -> None:
        __tracebackhide__ = True
        if request.config.getoption(MUST_COMPARE, default=False):
            raise Inconclusive(reason)
        pytest.skip(reason)

    return end
