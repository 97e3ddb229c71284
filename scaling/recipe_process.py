"""Recipes as processes: a command line goes in, the exit code comes out, what is said in a log.

A fork of a worker that has imported everything starts at once, and is safe where no GPU is used;
elsewhere every run is a process of its own.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Required, TypedDict, Unpack

from unitransformer.config import Recipe
from unitransformer.launch.process_tree import Ending, die_with_parent, end_process, wait_within


@dataclass(frozen=True, kw_only=True)
class ProcessResult:
    """How a run ended."""

    exit_code: int | None  # None: it passed a limit; negative: the signal that ended it
    elapsed_s: float
    ending: Ending = "ended"  # or the limit that it passed


class RunnerOptions(TypedDict, total=False):
    """How a `Runner` runs a recipe."""

    log: Required[Path]  # gets what the recipe prints
    limit_s: Required[float]
    memory_limit_bytes: int | None  # of all its processes together; None: the machine's
    variables: dict[str, str]  # added to the environment


class Runner(Protocol):
    """Runs a recipe and waits for it; it and all it has started are ended at a limit."""

    def __call__(
        self, recipe: Recipe, arguments: Sequence[str], **options: Unpack[RunnerOptions]
    ) -> ProcessResult: ...


def run_alone(
    recipe: Recipe, arguments: Sequence[str], **options: Unpack[RunnerOptions]
) -> ProcessResult:
    """A `Runner`: a process of its own."""
    return run_command([sys.executable, "-m", f"recipes.{recipe}", *arguments], **options)


def run_command(command: Sequence[str], **options: Unpack[RunnerOptions]) -> ProcessResult:
    """Run any command as a `Runner` runs a recipe."""
    started_s, parent = time.monotonic(), os.getpid()
    with options["log"].open("w") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **options.get("variables", {})},
            preexec_fn=lambda: die_with_parent(parent),
        )

        def wait(seconds: float) -> bool:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            return process.returncode is not None

        try:
            ending = wait_within(
                process.pid,
                wait,
                limit_s=options["limit_s"],
                memory_limit_bytes=options.get("memory_limit_bytes"),
            )
        finally:
            if process.returncode is None:
                end_process(process)
    return ProcessResult(
        ending=ending,
        exit_code=process.returncode if ending == "ended" else None,
        elapsed_s=time.monotonic() - started_s,
    )


def find_error(lines: Sequence[str], exit_code: int | None) -> str:
    """Why a run failed, by what it said last: its own error, or else its last line."""
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        # The record of a run that failed may go with its folder.
        return re.sub(r" \(record: [^)]*\)$", "", errors[-1].removeprefix("error: "))
    return f"exit code {exit_code}: {lines[-1] if lines else 'nothing was said'}"


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
        self, recipe: Recipe, arguments: Sequence[str], **options: Unpack[RunnerOptions]
    ) -> ProcessResult:
        request = {"recipe": recipe, "arguments": list(arguments), **options}
        return ProcessResult(**self._ask(request | {"log": str(options["log"])}))

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
            raise RuntimeError(
                f"recipes.service.worker ended: {told[-1] if told else 'without a word'}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        parent = os.getpid()
        with self.log.open("w") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "recipes.service.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                # It imports for seconds, with a request waiting that nobody may want any more.
                preexec_fn=lambda: die_with_parent(parent),
            )

    def end(self) -> None:
        """End the worker and the run it may be in the middle of."""
        if self.process is not None:
            end_process(self.process)
            self.process = None
