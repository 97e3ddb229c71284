"""Runs modules of this suite in subprocesses, which may import torch, and reads their output."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from unitransformer.launch.process_tree import die_with_parent, end_process


def run_module(
    module: str, arguments: Sequence[str], *, limit_s: float, stdin_text: str = ""
) -> str:
    """Returns what a module prints. Ends it and its descendants after `limit_s`.

    Raises ValueError with the module's message if it refuses its input (exit code 2), and
    RuntimeError if it fails otherwise or takes too long.
    """
    process = _start([sys.executable, "-m", module, *arguments], subprocess.PIPE, {})
    try:
        printed, errors = process.communicate(stdin_text, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{module} has not ended after {limit_s:.0f} s") from None
    finally:
        if process.returncode is None:
            end_process(process)
    if process.returncode == 0:
        return printed
    message = _message(errors, f"{module} ended with {process.returncode} and no error message")
    raise ValueError(message) if process.returncode == 2 else RuntimeError(message)


@contextlib.contextmanager
def open_module(module: str, *, limit_s: float) -> Iterator[Callable[[str], str]]:
    """Runs a module that answers each line by a line, until the block ends.

    Yields a function that sends a line and returns the answer. It raises ValueError with the
    module's message if it refuses its input (exit code 2), and RuntimeError if it fails otherwise
    or takes longer than `limit_s` for one answer.
    """
    with open_command(module, [sys.executable, "-m", module], limit_s=limit_s) as ask:
        yield ask


@contextlib.contextmanager
def open_command(
    module: str,
    command: Sequence[str],
    *,
    limit_s: float,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Callable[[str], str]]:
    """Runs a command as `open_module` runs a module; `module` is its name in messages.

    Args:
        variables: added to its environment.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = _start(command, errors, variables or {})
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(line: str) -> str:
            is_late = threading.Event()

            def end_late() -> None:
                is_late.set()
                process.kill()

            late = threading.Timer(limit_s, end_late)
            late.start()
            try:
                stdin.write(f"{line}\n")
                stdin.flush()
                answer = stdout.readline()
            except BrokenPipeError:
                answer = ""
            finally:
                late.cancel()
            if answer:
                return answer
            code = process.wait()
            if is_late.is_set():
                raise RuntimeError(f"{module} has not answered within {limit_s:.0f} s")
            if code == -signal.SIGKILL:
                raise RuntimeError(f"{module} was killed, as the system does when memory runs out")
            errors.seek(0)
            message = _message(errors.read(), f"{module} ended without an error message")
            raise ValueError(message) if code == 2 else RuntimeError(message)

        try:
            yield ask
        finally:
            end_process(process)


def _start(
    command: Sequence[str], errors: "TextIO | int", variables: Mapping[str, str]
) -> "subprocess.Popen[str]":
    parent = os.getpid()
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        encoding="utf-8",
        errors="surrogateescape",  # names of files may be any bytes
        env={**os.environ, "PYTHONIOENCODING": "utf-8:surrogateescape", **variables},
        preexec_fn=lambda: die_with_parent(parent),
    )


def _message(errors: str, otherwise: str) -> str:
    """Returns the last line that a module printed to standard error."""
    lines = errors.strip().splitlines() or [otherwise]
    return lines[-1].removeprefix("error: ")
