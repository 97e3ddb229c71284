"""When not to look for garbage."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """For what makes many objects that stay: a search goes through all of them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def importing(name: str) -> Iterator[None]:
    """For the first import of a heavy module: what it brings stays, and is no garbage at the exit
    either. With torch and Lightning that is a third of a process that does little else.
    """
    if name in sys.modules:
        yield
        return
    with no_collection():
        yield
        gc.freeze()
