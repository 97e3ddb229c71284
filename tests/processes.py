"""Processes that a test has started, and those that these have."""

import time
from collections.abc import Collection

import psutil


def is_alive(process: psutil.Process) -> bool:
    """Neither gone nor ended, which the first process of a machine may be slow to notice."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until_ended(processes: Collection[psutil.Process], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while left := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline_s, f"still running: {left}"
        time.sleep(0.01)
