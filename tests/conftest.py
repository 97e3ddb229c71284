"""What every test stands on."""

import gc
import os

# Tiny models gain nothing from more threads, and lose much where the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compilers that are forked beside threads would wait for them for ever.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest

import unitransformer  # noqa: F401  (torchvision beside a CPU torch is mended before lightning)


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every worker of pytest-xdist is given a run of tests in order: first of those that take
    seconds, then of the many that take none, which fill up the time at the end."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    short = [item for item in items if item.path.parent.name in ("unit", "contracts")]
    long = [item for item in items if item.path.parent.name not in ("unit", "contracts")]
    items[:] = [
        item
        for worker in range(workers)
        for kind in (long, short)
        for item in kind[worker * len(kind) // workers : (worker + 1) * len(kind) // workers]
    ]


def pytest_collection_finish() -> None:
    """What has been imported by now is no garbage, and takes long to look through every time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A launcher's variables, also those a run under test sets, never reach the next test."""
    before = dict(os.environ)
    for name in ("UNITRANSFORMER_RUN_FOLDER", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent
