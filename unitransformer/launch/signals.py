"""Signals that ask a run to stop, as batch systems send them ahead of a limit or a preemption."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
EXIT_CODE = os.EX_TEMPFAIL  # 75: stopped by one of them; the same command goes on


class Stopped(Exception):
    """All ranks left training at the end of the same step, because a signal asked for it."""

    def __init__(self, number: int, *, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")


class StopAsked(KeyboardInterrupt):
    """One of `SIGNALS` where there is nothing to save: what is under way is given up."""


class StopSignals:
    """Notes the first of `SIGNALS` while it is open; a handler does nothing else.

    Saving from within a handler would wait for ranks that wait for this one.
    """

    def __init__(self) -> None:
        self.caught = 0  # number of the signal; 0: none yet
        self._before: Mapping[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other may ask for signals
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.caught = self.caught or number


@contextlib.contextmanager
def holding_interrupt() -> Iterator[None]:
    """Ctrl-C waits for the end of what must not be left in the middle."""
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if before is None or not is_main:  # not Python's, or no place where it would be raised
        yield
        return
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            signal.raise_signal(signal.SIGINT)
