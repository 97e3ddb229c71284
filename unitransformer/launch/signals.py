"""Signals that ask a run to stop, as batch systems send them ahead of a limit or a preemption."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
EXIT_CODE = os.EX_TEMPFAIL  # 75: stopped by one of them; the same command goes on


class Stopped(Exception):
    """All ranks left training at the end of the same step, because a signal asked for it."""

    def __init__(self, number: int, *, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")


class StopAsked(KeyboardInterrupt):
    """One of `SIGNALS` where there is nothing to save: what is under way is given up."""


@contextlib.contextmanager
def handling(
    numbers: Sequence[int], handle: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Within, `handle` is called at these signals; afterwards what was called before."""
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """Notes the first of `SIGNALS` while it is open; a handler does nothing else.

    Saving from within a handler would wait for ranks that wait for this one.
    """

    def __init__(self) -> None:
        self.caught = 0  # number of the signal; 0: none yet
        self._handling = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other may ask for signals
            self._handling.enter_context(handling(SIGNALS, self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.close()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.caught = self.caught or number


@contextlib.contextmanager
def holding_interrupt() -> Iterator[None]:
    """Ctrl-C waits for the end of what must not be left in the middle."""
    is_main = threading.current_thread() is threading.main_thread()
    # Not Python's, or no place where it would be raised.
    if signal.getsignal(signal.SIGINT) is None or not is_main:
        yield
        return
    caught: list[int] = []
    try:
        with handling([signal.SIGINT], lambda number, _: caught.append(number)):
            yield
    finally:
        if caught:
            signal.raise_signal(signal.SIGINT)
