"""Fixtures of tests that start ranks."""

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.processes import PATIENCE_S

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@pytest.fixture
def _no_orphans() -> Iterator[None]:
    """Asserts that every process that the test started has ended, even without its parent."""
    before = set(psutil.Process().children(recursive=True))
    # Orphans become children of this process, so that they are seen.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
        deadline = time.monotonic() + PATIENCE_S
        while left := set(psutil.Process().children(recursive=True)) - before:
            for orphan in left:
                with contextlib.suppress(psutil.Error, ChildProcessError):
                    if orphan.status() == psutil.STATUS_ZOMBIE:
                        os.waitpid(orphan.pid, os.WNOHANG)
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.05)
    finally:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)
