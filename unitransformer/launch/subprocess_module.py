"""Modules of ours asked in a process of their own, where they may import what this one must not."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from unitransformer.launch.process_tree import die_with_parent, end_process


def run_module(
    module: str, arguments: Sequence[str], *, limit_s: float, stdin_text: str = ""
) -> str:
    """What a module of ours prints; it and all it has started are ended after `limit_s`,
    and with the process that asks.

    Args:
        asked: what it reads from its standard input.

    Raises:
        ValueError: it says that it was asked for something wrong.
        RuntimeError: it failed, in its own words; or it took too long.
    """
    parent = os.getpid()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: die_with_parent(parent),
    )
    try:
        printed, errors = process.communicate(stdin_text, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{module} has not ended after {limit_s:.0f} s") from None
    finally:
        if process.returncode is None:
            end_process(process)
    if process.returncode == 0:
        return printed
    last = (errors.strip().splitlines() or [f"it ended with {process.returncode} and no word"])[-1]
    told = last.removeprefix("error: ")
    raise ValueError(told) if process.returncode == 2 else RuntimeError(told)


@contextlib.contextmanager
def open_module(module: str, *, limit_s: float) -> Iterator[Callable[[str], str]]:
    """A module of ours that answers each line by a line, until the block ends.

    Args:
        limit_s: of one answer.

    Returns:
        Asks; raises RuntimeError if the module failed, in its own words, or took too long.
    """
    parent = os.getpid()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=lambda: die_with_parent(parent),
        )
        try:
            yield lambda line: _ask(process, line, module, limit_s, errors)
        finally:
            end_process(process)


def _ask(
    process: "subprocess.Popen[str]", line: str, module: str, limit_s: float, errors: TextIO
) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Timer(limit_s, process.kill)
    late.start()
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    finally:
        late.cancel()
    if answer:
        return answer
    if process.wait() == -signal.SIGKILL:
        raise RuntimeError(f"{module} does not answer within {limit_s:.0f} s")
    errors.seek(0)
    said = errors.read().strip().splitlines() or [f"{module} ended without a word"]
    raise RuntimeError(said[-1].removeprefix("error: "))
