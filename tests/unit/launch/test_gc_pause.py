"""Tests that garbage collection pauses during imports and resumes."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from unitransformer.launch.gc_pause import pause_gc

FIRST = """
import gc, sys
from unitransformer.launch.gc_pause import heavy_import

with heavy_import("wave"):
    assert not gc.isenabled()
    import wave
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 0
with heavy_import("wave"):
    assert gc.isenabled()
    more = [[] for _ in range(1000)]
assert gc.get_freeze_count() == frozen
"""


def test_garbage_collection_resumes_even_after_an_error() -> None:
    @pause_gc()
    def fail() -> None:
        raise ValueError(f"collects: {gc.isenabled()}")

    assert gc.isenabled()
    with pytest.raises(ValueError, match="collects: False"):
        fail()
    assert gc.isenabled()


def test_garbage_collection_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with pause_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_only_the_first_import_is_frozen(repository: Path) -> None:
    subprocess.run([sys.executable, "-c", FIRST], cwd=repository, check=True)
