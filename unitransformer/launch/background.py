"""Runs a function in a second process while this one goes on."""

import contextlib
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")


def start_in_background(function: Callable[[], T]) -> Callable[[], T] | None:
    """Calls a function without side effects in a fork of this process.

    Returns:
        A function that waits for the value, which must be picklable. It calls `function` again if
        the fork ended without a value, so that its error is raised here. None: this process
        cannot fork.
    """
    # Threads, such as those of torch, do not survive a fork; macOS libraries abort in one.
    if sys.platform != "linux" or "torch" in sys.modules:
        return None
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, sender), daemon=True)
    process.start()
    sender.close()

    def wait() -> T:
        values: list[T] = []
        with receiver, contextlib.suppress(EOFError):
            values.append(receiver.recv())
        process.join()
        return values[0] if values else function()

    return wait


def _send(function: Callable[[], object], sender: Connection) -> None:
    with contextlib.suppress(
        Exception, KeyboardInterrupt
    ):  # `wait` calls it again, which raises it
        sender.send(function())
