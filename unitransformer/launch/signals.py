"""Handles signals that ask a run to stop; batch systems send them before a limit or preemption."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Self

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
STOPPED_EXIT_CODE = os.EX_TEMPFAIL  # 75: a signal stopped the run; the same command resumes it


class Stopped(Exception):
    """All ranks left training at the end of the same step, because a signal asked for it."""

    def __init__(self, number: int, *, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")


class StopRequested(KeyboardInterrupt):
    """One of `STOP_SIGNALS` arrived where there is nothing to save."""


@contextlib.contextmanager
def handle_signals(
    numbers: Sequence[int], handle: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Calls `handle` at these signals within the block, and restores the handlers after it."""
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignalListener(contextlib.ExitStack):
    """Notes the first of `STOP_SIGNALS` within a block; a handler does nothing else.

    Saving from within a handler would wait for ranks that wait for this one.
    """

    caught = 0  # number of the signal; 0: none yet

    def __enter__(self) -> Self:
        if _is_main_thread():  # others cannot set handlers
            self.enter_context(handle_signals(STOP_SIGNALS, self._note))
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.caught = self.caught or number


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def defer_interrupt() -> Iterator[None]:
    """Delays Ctrl-C until the end of a block that must not be left halfway."""
    # None: the handler was not set by Python, which could not restore it.
    if signal.getsignal(signal.SIGINT) is None or not _is_main_thread():
        yield
        return
    caught: list[int] = []
    try:
        with handle_signals([signal.SIGINT], lambda number, _: caught.append(number)):
            yield
    finally:
        if caught:
            signal.raise_signal(signal.SIGINT)
