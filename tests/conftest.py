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
