"""Stores counter baselines in the repository, and times in one folder per machine."""

import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.clock import PACKAGES, machine

UPDATE = "--update-baseline"
NOT_COMPARED = pytest.StashKey[str]()  # why times are not compared


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        UPDATE, action="store_true", help="write the baselines of the counters instead of comparing"
    )


def folder_of_times() -> Path:
    """Folder of the stored times of this machine, relative to the working directory."""
    return Path(".benchmarks") / f"{machine().fingerprint}-{torch.get_num_threads()}-threads"


def pytest_configure(config: pytest.Config) -> None:
    # The default of pytest-benchmark: the user gave no other folder.
    if getattr(config.option, "benchmark_storage", None) == "file://./.benchmarks":
        config.option.benchmark_storage = f"file://./{folder_of_times()}"
        # pytest-benchmark raises if there is nothing to compare with.
        if config.option.benchmark_compare and not any(folder_of_times().glob("*/*.json")):
            config.option.benchmark_compare_fail = []
            config.stash[NOT_COMPARED] = (
                f"{folder_of_times()}: no times of this machine to compare with"
            )


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
    benchmarksession: Any,
    machine_info: dict[str, Any],
    compared_benchmark: dict[str, Any],
) -> None:
    ours, theirs = (
        [info.get("unitransformer", {}).get(name) for name in ("fingerprint", "threads")]
        for info in (machine_info, compared_benchmark["machine_info"])
    )
    if ours != theirs:
        benchmarksession.compare_fail = []
        config.stash[NOT_COMPARED] = (
            f"Times of another machine ({theirs[0]}): no test fails on them"
        )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if NOT_COMPARED in config.stash:
        terminalreporter.write_line(config.stash[NOT_COMPARED])


@pytest.fixture
def updates_baseline(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption(UPDATE, default=False))
