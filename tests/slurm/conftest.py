"""Boots one cluster for all tests here; without SLURM they skip with the install command."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.slurm.cluster import Cluster, missing, running_cluster

EACH = 64  # job numbers per worker of pytest-xdist
NEEDED = "UNITRANSFORMER_NEEDS_SLURM"  # 1: these tests fail instead of skipping


def skip_or_fail(why: str) -> NoReturn:
    """Ends a test for which something is not installed."""
    if os.environ.get(NEEDED) == "1":
        pytest.fail(f"{NEEDED} is 1: {why}")
    pytest.skip(why)


@pytest.fixture(scope="session")
def has_slurm() -> None:
    if (why := missing()) is not None:
        skip_or_fail(why)


@pytest.fixture(scope="session")
def booted(has_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 1 + EACH * worker
    with running_cluster(tmp_path_factory.mktemp("slurm"), first_job=first) as cluster:
        yield cluster


@pytest.fixture
def cluster(booted: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, found by SLURM's commands, and restored after every test."""
    for name, value in booted.variables.items():
        monkeypatch.setenv(name, value)
    yield booted
    booted.restore()


@pytest.fixture
def work(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from."""
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
