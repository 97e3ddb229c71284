"""Runs functions in forks, and waits until processes that a test started have ended."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection

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


def failure_in_fork(function: Callable[[], object]) -> str:
    """Calls a function in a forked process; returns how it failed, or an empty text."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_send_failure, args=(function, writer))
    process.start()
    writer.close()  # so that the reader notices the end of the process
    try:
        return str(reader.recv())
    except EOFError:
        process.join()
        return f"the process ended with exit code {process.exitcode}"
    finally:
        process.join()


def _send_failure(function: Callable[[], object], writer: Connection) -> None:
    try:
        function()
    except BaseException:
        writer.send(traceback.format_exc())
    else:
        writer.send("")
