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

from unitransformer.files import read_if_there

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
    names = Path("/proc/self/task").glob("*/comm")
    threads = [name.parent for name in names if read_if_there(name).strip() == THREAD]
    end_s = time.monotonic() + TIMEOUT_S
    times_idle = 0
    while threads and times_idle < 2 and time.monotonic() < end_s:
        time.sleep(PAUSE_S)
        times_idle = times_idle + 1 if all(map(_is_idle, threads)) else 0


def _is_idle(thread: Path) -> bool:
    # "pid (name) state ..."; a name may hold brackets. Empty if the thread has ended.
    state = read_if_there(thread / "stat").rpartition(")")[2].split()[:1]
    return state in ([], ["S"])
