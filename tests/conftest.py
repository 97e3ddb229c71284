"""Settings and fixtures of every test."""

import gc
import os

# Tiny models gain nothing from more threads, and are slower when processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiler processes forked from a process with threads can deadlock.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# Asks NVML whether there is a GPU: asking CUDA would break it in the ranks that tests fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

import unitransformer  # noqa: F401  (repairs the import of torchvision beside a CPU torch, before lightning)

FAST = ("unit", "contracts")  # folders


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives every worker of pytest-xdist its slow tests first, then its fast ones.

    The many fast tests fill up the time until the last worker ends.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    kinds = [item.path.relative_to(Path(__file__).parent).parts[0] for item in items]
    short = [item for item, kind in zip(items, kinds, strict=True) if kind in FAST]
    long = [item for item, kind in zip(items, kinds, strict=True) if kind not in FAST]
    items[:] = [
        item
        for worker in range(workers)
        for kind in (long, short)
        for item in kind[worker * len(kind) // workers : (worker + 1) * len(kind) // workers]
    ]


def pytest_collection_finish() -> None:
    """Exempts imported objects from garbage collection, which would scan them every time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps a launcher's variables, and those that a tested run sets, from the next test."""
    before = dict(os.environ)
    for name in ("UNITRANSFORMER_RUN_FOLDER", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent
