"""Where Python waits for what another rank sends: one place to stand around all of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed._functional_collectives as functional_collectives
from torch.distributed import Work

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
