"""Waits until processes that a test started, and their children, have ended."""

import time
from collections.abc import Collection

import psutil

PATIENCE_S = 300.0  # bounds a wait that would hang; a slow machine must not exceed it


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not, though init may be slow to reap it."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until_ended(processes: Collection[psutil.Process], timeout_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while left := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline_s, f"still running: {left}"
        time.sleep(0.01)
