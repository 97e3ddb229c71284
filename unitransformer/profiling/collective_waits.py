"""Hooks around waiting for collectives, and a wait that lasts until gloo releases their tensors.

A gloo thread wakes the waiter, then releases the collective's tensors slightly later. Which thread
holds them last, and so when their memory is freed, would be left to chance.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed._functional_collectives as functional_collectives
from torch.distributed import Work

Wait = Callable[..., Any]

THREAD = "pt_gloo_runloop"  # torch's name for gloo threads
TIMEOUT_S = 0.05  # a thread that is busy for longer runs another collective
PAUSE_S = 2e-4


@contextlib.contextmanager
def replace_method(owner: Any, name: str, wrap: Callable[[Wait], Wait]) -> Iterator[None]:
    """Replaces a function of a class or module by `wrap` of it inside the block; may be nested."""
    function = getattr(owner, name)
    setattr(owner, name, wrap(function))
    try:
        yield
    finally:
        setattr(owner, name, function)


@contextlib.contextmanager
def wrap_waits(wrap: Callable[[Wait], Wait]) -> Iterator[None]:
    """Wraps every wait for a collective inside the block."""
    with (
        replace_method(Work, "wait", wrap),
        replace_method(functional_collectives, "wait_tensor", wrap),
    ):
        yield


@contextlib.contextmanager
def wait_for_release() -> Iterator[None]:
    """Makes every wait inside the block last until gloo's threads have released the tensors."""

    def releasing(wait: Wait) -> Wait:
        def wait_until_released(*arguments: Any, **options: Any) -> Any:
            result = wait(*arguments, **options)
            _wait_for_idle_threads()
            return result

        return wait_until_released

    with wrap_waits(releasing):
        yield


def _wait_for_idle_threads() -> None:
    threads = [path.parent for path in Path("/proc/self/task").glob("*/comm") if _is_gloo(path)]
    end_s = time.monotonic() + TIMEOUT_S
    times_idle = 0
    while threads and times_idle < 2 and time.monotonic() < end_s:
        time.sleep(PAUSE_S)
        times_idle = times_idle + 1 if all(map(_is_idle, threads)) else 0


def _is_gloo(comm: Path) -> bool:
    try:
        return comm.read_text().strip() == THREAD
    except OSError:  # the thread has ended
        return False


def _is_idle(thread: Path) -> bool:
    try:
        # "pid (name) state ..."; a name may hold brackets.
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "S"
    except OSError:
        return True
