"""Baselines: of counters in the repository, of times in a folder of each machine's own."""

import importlib.metadata
from dataclasses import asdict
from typing import Any

import pytest
import torch

from tests.benchmarks.clock import PACKAGES, machine

UPDATE, PROVE = "--update-baseline", "--whole-proof"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        UPDATE, action="store_true", help="write the counters' baselines anew in place of comparing"
    )
    parser.addoption(
        PROVE, action="store_true", help="count everything 20 times, half of them on a busy machine"
    )


def pytest_configure(config: pytest.Config) -> None:
    # `None` would be the option's default as well; this is pytest-benchmark's own.
    if getattr(config.option, "benchmark_storage", None) == "file://./.benchmarks":
        place = f"{machine().fingerprint}-{torch.get_num_threads()}-threads"
        config.option.benchmark_storage = f"file://./.benchmarks/{place}"


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    machine_info |= {
        "unitransformer": {
            **asdict(machine()),
            "threads": torch.get_num_threads(),
            "versions": versions,
        }
    }


@pytest.fixture
def updates_baseline(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption(UPDATE, default=False))


@pytest.fixture
def is_whole_proof(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption(PROVE, default=False))
