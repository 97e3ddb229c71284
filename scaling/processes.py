"""Recipes as processes: a command line goes in, the exit code comes out, what is said in a log.

A fork of a worker that has imported everything starts at once, and is safe where no GPU is used;
elsewhere every run is a process of its own.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unitransformer.config import Recipe


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended."""

    exit_code: int | None  # None: it took too long; negative: the signal that ended it
    elapsed_s: float


class Runner(Protocol):
    """Runs a recipe and waits for it."""

    def __call__(
        self, recipe: Recipe, arguments: Sequence[str], *, log: Path, limit_s: float
    ) -> Ended: ...


def run_alone(recipe: Recipe, arguments: Sequence[str], *, log: Path, limit_s: float) -> Ended:
    """A process of its own; it and all it has started are ended after `limit_s`."""
    started_s = time.monotonic()
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", f"recipes.{recipe}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        exit_code: int | None = None
        try:
            exit_code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.returncode is None:
                _end(process)
    return Ended(exit_code=exit_code, elapsed_s=time.monotonic() - started_s)


def run_module(module: str, arguments: Sequence[str], *, limit_s: float) -> str:
    """What a module of ours prints; it and all it has started are ended after `limit_s`.

    Raises:
        ValueError: it says that it was asked for something wrong.
        RuntimeError: it failed, in its own words; or it took too long.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{module} has not ended after {limit_s:.0f} s") from None
    finally:
        if process.returncode is None:
            _end(process)
    if process.returncode == 0:
        return printed
    last = (errors.strip().splitlines() or [f"it ended with {process.returncode} and no word"])[-1]
    told = last.removeprefix("error: ")
    raise ValueError(told) if process.returncode == 2 else RuntimeError(told)


def can_fork(accelerator: str) -> bool:
    """Whether runs may be forks of one worker."""
    return accelerator == "cpu" and sys.platform == "linux"


@contextlib.contextmanager
def start_worker(log: Path) -> Iterator[Runner]:
    """A worker that runs recipes in forks of itself until the block ends.

    Args:
        log: what the worker itself says.
    """
    worker = _Worker(log)
    try:
        yield worker
    finally:
        worker.end()


class _Worker:
    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[str] | None = None

    def __call__(
        self, recipe: Recipe, arguments: Sequence[str], *, log: Path, limit_s: float
    ) -> Ended:
        request = {
            "recipe": recipe,
            "arguments": list(arguments),
            "log": str(log),
            "limit_s": limit_s,
        }
        return Ended(**self._ask(request))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            line = ""
        else:
            line = self.process.stdout.readline()
        if not line:
            told = self.log.read_text(errors="replace").strip().splitlines()
            self.end()
            raise RuntimeError(f"recipes.worker ended: {told[-1] if told else 'without a word'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        with self.log.open("w") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "recipes.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )

    def end(self) -> None:
        """End the worker and the run it may be in the middle of."""
        if self.process is not None:
            _end(self.process)
            self.process = None


def _end(process: "subprocess.Popen[Any]") -> None:
    """Kill a process and its group; ranks in groups of their own end with who started them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
