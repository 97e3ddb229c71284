"""Repeats a run: each launch is a new process with its own record."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.options import RecipeOptions
from recipes.train import RunRequest, claim_folder
from unitransformer.launch.environment import launched_shape
from unitransformer.launch.process_tree import die_with_parent
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE, handle_signals
from unitransformer.launch.variables import RUN_FOLDER
from unitransformer.record.metrics import format_launch_variance, recorded_steady_state
from unitransformer.record.schema import Record, load_record
from unitransformer.stats.comparisons import describe_launch, split_variance


def run_repeats(request: RunRequest, options: RecipeOptions) -> int:
    """Launches `options.repeats` times; returns the exit code of the first failure, or 0.

    Raises:
        ValueError: an option that names one path for all launches, or that is for a single run.
    """
    _check(options, request.config.parallel.num_nodes)
    command = [sys.executable, "-m", f"recipes.{request.recipe}"]
    command += _single_launch(request.arguments)
    records = []
    for number in range(1, options.repeats + 1):
        paths, _ = claim_folder(request)
        print(f"launch {number} of {options.repeats}: {paths.folder}", flush=True)
        code = _launch(command, paths.folder)
        if code:
            return code if code > 0 else 128 - code
        records.append(load_record(paths.record))
        print(flush=True)
    print(f"launches    {format_launches(records)}")
    return 0


def _launch(command: Sequence[str], folder: Path) -> int:
    """Waits for a launch and returns its exit code; forwards signals, so that it can save."""
    parent = os.getpid()
    process = subprocess.Popen(
        command,
        env={**os.environ, RUN_FOLDER: str(folder)},
        preexec_fn=lambda: die_with_parent(parent),
    )
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        process.send_signal(number)

    with handle_signals((signal.SIGINT, *STOP_SIGNALS), forward):
        code = process.wait()
    return 128 + received[0] if received and code != STOPPED_EXIT_CODE else code


def format_launches(records: Sequence[Record]) -> str:
    """Formats the median step, and its variance within and between launches."""
    launches = []
    for number, record in enumerate(records, start=1):
        steady = recorded_steady_state(record)
        if steady.start is None:
            return f"launch {number} has no steady state: {steady.reason}"
        steps = steady.select(record["step_s"][record["segment_starts"][-1] :])
        launches.append(describe_launch(steps))
    return format_launch_variance(split_variance(launches))


def _check(options: RecipeOptions, num_nodes: int) -> None:
    for name in ("record", "checkpoint_dir", "trace"):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"repeats is {options.repeats} and {flag} is one path for all launches; leave "
                f"{flag} out"
            )
    if options.resume:
        raise ValueError(
            f"repeats is {options.repeats} and --resume continues a single run; leave one out"
        )
    if launched_shape() is not None or num_nodes > 1:
        raise ValueError(
            f"repeats is {options.repeats} and torchrun or srun launches once; leave --repeats out "
            "and start it several times"
        )


def _single_launch(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments without --repeats."""
    single: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--repeats":
            next(rest)
        elif not argument.startswith("--repeats="):
            single.append(argument)
    if any(argument.partition("=")[0] == "--config" for argument in single):
        single += ["--repeats", "1"]  # overrides the file
    return single
