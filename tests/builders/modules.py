"""Runs modules in this process, which has imported torch, instead of in processes that first do."""

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

from recipes.service import plan


def run_here(module: str, arguments: Sequence[str], *, limit_s: float, stdin_text: str = "") -> str:
    """As `subprocess_module.run_module`, in this process."""
    main = importlib.import_module("scaling.__main__" if module == "scaling" else module).main
    given = [] if module == plan.__name__ else [list(arguments)]
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()) as errors,
        mock.patch.object(sys, "stdin", io.StringIO(stdin_text)),
    ):
        code = main(*given)
    if code == 0:
        return printed.getvalue()
    message = errors.getvalue().strip().splitlines()[-1].removeprefix("error: ")
    raise ValueError(message) if code == 2 else RuntimeError(message)


@contextlib.contextmanager
def open_here(module: str, *, limit_s: float) -> Iterator[Callable[[str], str]]:
    """As `subprocess_module.open_module`, in this process, of the module that resolves options."""
    assert module == plan.__name__

    def ask(line: str) -> str:
        question = json.loads(line)
        return json.dumps(plan._machine() if "machine" in question else plan._answer(**question))

    yield ask
