"""Runs a recipe command line as a process and returns how it ended; its output goes to a log.

A fork of a worker that has imported everything starts at once, and is safe where no GPU is used.
Otherwise every run is a new process.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Required, TypedDict, Unpack

from unitransformer.config import Recipe
from unitransformer.launch.process_tree import Ending, die_with_parent, end_process, wait_within
from unitransformer.launch.signals import STOPPED_EXIT_CODE, StopRequested

END_RANKS_S = 20.0  # until a process has ended its ranks on other nodes

# Options that a command sets for each of its runs, or that do not train.
RESERVED_OPTIONS = shlex.split(
    "out record checkpoint-dir checkpoint-every keep-checkpoints no-checkpoint resume repeats "
    "trace summary dry-run hardware rehearse json config print_config help"
)


@dataclass(frozen=True, kw_only=True)
class ProcessResult:
    """How a run ended."""

    exit_code: int | None  # None: it exceeded a limit; negative: the signal that ended it
    elapsed_s: float
    ending: Ending = "ended"  # or the limit that it exceeded


class RunnerOptions(TypedDict, total=False):
    log: Required[Path]  # receives the output
    limit_s: Required[float]
    memory_limit_bytes: int | None  # of all its processes together; None: the machine's memory
    variables: dict[str, str]  # added to the environment


class Runner(Protocol):
    """Runs a recipe and waits for it; at a limit it ends the run and all its processes."""

    def __call__(
        self, recipe: Recipe, arguments: Sequence[str], **options: Unpack[RunnerOptions]
    ) -> ProcessResult: ...


def run_alone(
    recipe: Recipe, arguments: Sequence[str], **options: Unpack[RunnerOptions]
) -> ProcessResult:
    """A `Runner` that starts a new process."""
    return run_command([sys.executable, "-m", f"recipes.{recipe}", *arguments], **options)


def start_ranks_with(command: Sequence[str], devices: int) -> Runner:
    """Returns a `Runner` that starts so many ranks on each node of a job, by `command`.

    It raises StopRequested where the job, and not the cell, has to end.
    """

    def run(
        recipe: Recipe, arguments: Sequence[str], **options: Unpack[RunnerOptions]
    ) -> ProcessResult:
        whole = [*command, f"--devices={devices}", recipe, "--", *arguments]
        ended = run_command(whole, end=end_gently, **options)
        if ended.exit_code == STOPPED_EXIT_CODE:
            raise StopRequested("the end of the job or of a node")
        return ended

    return run


def end_gently(process: "subprocess.Popen[Any]") -> None:
    """Lets a process end the ranks that it has started on other nodes, and ends it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_RANKS_S)
    end_process(process)


def run_command(
    command: Sequence[str],
    *,
    end: Callable[["subprocess.Popen[Any]"], None] = end_process,
    **options: Unpack[RunnerOptions],
) -> ProcessResult:
    """Runs any command as a `Runner` runs a recipe.

    Args:
        end: ends the process, and all that it has started, at a limit or a signal.
    """
    started_s, parent = time.monotonic(), os.getpid()
    with options["log"].open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
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
                kill=lambda _: end(process),
            )
        finally:
            if process.returncode is None:
                end(process)
    return ProcessResult(
        ending=ending,
        exit_code=process.returncode if ending == "ended" else None,
        elapsed_s=time.monotonic() - started_s,
    )


def find_error(lines: Sequence[str], exit_code: int | None) -> str:
    """Returns the last error that a run printed, or else its exit code and last line."""
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        # The record of a failed run may be deleted with its folder.
        return re.sub(r" \(record: [^)]*\)$", "", errors[-1].removeprefix("error: "))
    return f"exit code {exit_code}: {lines[-1] if lines else 'no output'}"


def can_fork(accelerator: str) -> bool:
    """Whether runs may be forks of one worker."""
    return accelerator == "cpu" and sys.platform == "linux"


def start_worker(log: Path) -> contextlib.AbstractContextManager[Runner]:
    """Yields a `Runner` whose runs are forks of one process, whose errors go to `log`."""
    return contextlib.closing(_Worker(log))


class _Worker:
    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[str] | None = None

    def __call__(
        self, recipe: Recipe, arguments: Sequence[str], **options: Unpack[RunnerOptions]
    ) -> ProcessResult:
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request: dict[str, Any] = {"recipe": recipe, "arguments": list(arguments), **options}
        try:
            self.process.stdin.write(json.dumps(request | {"log": str(options["log"])}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
            self.close()
            raise RuntimeError(f"recipes.service.worker ended: {lines[-1]}")
        return ProcessResult(**json.loads(line))

    def _start(self) -> "subprocess.Popen[str]":
        parent = os.getpid()
        with self.log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "recipes.service.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # It imports for seconds, during which nobody else notices that the parent died.
                preexec_fn=lambda: die_with_parent(parent),
            )

    def close(self) -> None:
        """Ends the worker and its current run."""
        if self.process is not None:
            end_process(self.process)
            self.process = None
