"""Collectives over gloo that give their tensors back before the caller goes on.

A thread of gloo's wakes who waits for a collective and lets go of its tensors a moment later. Who
is the last to hold them, and so when their memory is given back, is then left to chance.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed._functional_collectives as functional_collectives
from torch.distributed import Work

THREAD = "pt_gloo_runloop"  # as torch names them

PATIENCE_S = 0.05  # a thread that does not come to rest is in the midst of another collective

PAUSE_S = 2e-4


@contextlib.contextmanager
def settled_collectives() -> Iterator[None]:
    """Within, waiting for a collective goes on until gloo's threads have let go of it."""
    with wrapped_waits(_settling):
        yield


def _settling(wait: Callable[..., Any]) -> Callable[..., Any]:
    def wait_and_settle(*arguments: Any, **options: Any) -> Any:
        result = wait(*arguments, **options)
        settle()
        return result

    return wait_and_settle


def settle() -> None:
    """Wait until gloo's threads rest."""
    threads = [path.parent for path in Path("/proc/self/task").glob("*/comm") if _is_gloo(path)]
    end_s = time.monotonic() + PATIENCE_S
    num_rests = 0
    while threads and num_rests < 2 and time.monotonic() < end_s:
        time.sleep(PAUSE_S)
        num_rests = num_rests + 1 if all(map(_rests, threads)) else 0


def _is_gloo(comm: Path) -> bool:
    try:
        return comm.read_text().strip() == THREAD
    except OSError:  # it has ended
        return False


def _rests(thread: Path) -> bool:
    try:
        # "pid (name) state ..."; a name may hold brackets.
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "S"
    except OSError:
        return True


Wait = Callable[..., Any]


@contextlib.contextmanager
def wrapped_waits(wrap: Callable[[Wait], Wait]) -> Iterator[None]:
    """Within, whoever waits for a collective does so by `wrap` of what waited before.

    Such blocks may stand one within another.
    """
    wait, wait_tensor = Work.wait, functional_collectives.wait_tensor
    Work.wait = wrap(wait)  # type: ignore[method-assign]
    functional_collectives.wait_tensor = wrap(wait_tensor)
    try:
        yield
    finally:
        Work.wait = wait  # type: ignore[method-assign]
        functional_collectives.wait_tensor = wait_tensor
