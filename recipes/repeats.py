"""The same run several times over: every launch a process of its own, with a record of its own."""

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
from unitransformer.record.metrics import launches_in_words, recorded_steady
from unitransformer.record.schema import Record, load_record
from unitransformer.stats.comparisons import describe_launch, split_variance


def run_repeats(asked: RunRequest, options: RecipeOptions) -> int:
    """Launch `options.repeats` times; returns the exit code of the first that fails, or 0.

    Raises:
        ValueError: options that would put all launches into one place.
    """
    _check(options, asked.config.parallel.num_nodes)
    command = [sys.executable, "-m", f"recipes.{asked.recipe}", *_once(asked.arguments)]
    records = []
    for number in range(1, options.repeats + 1):
        places, _ = claim_folder(asked)
        print(f"launch {number} of {options.repeats}: {places.folder}", flush=True)
        code = _launch(command, places.folder)
        if code:
            return code if code > 0 else 128 - code
        records.append(load_record(places.record))
        print(flush=True)
    print(f"launches    {format_launches(records)}")
    return 0


def _launch(command: Sequence[str], folder: Path) -> int:
    """One launch, to its end: a signal is handed on, and its record waited for."""
    parent = os.getpid()
    process = subprocess.Popen(
        command,
        env={**os.environ, RUN_FOLDER: str(folder)},
        preexec_fn=lambda: die_with_parent(parent),
    )
    received: list[int] = []

    def hand_on(number: int, _: object) -> None:
        received.append(number)
        process.send_signal(number)

    with handle_signals((signal.SIGINT, *STOP_SIGNALS), hand_on):
        code = process.wait()
    return 128 + received[0] if received and code != STOPPED_EXIT_CODE else code


def format_launches(records: Sequence[Record]) -> str:
    """The median step over launches, and how much of its scatter is theirs."""
    launches = []
    for number, record in enumerate(records, start=1):
        steady = recorded_steady(record)
        if steady.start is None:
            return f"launch {number} has no steady state: {steady.reason}"
        steps = steady.select(record["step_s"][record["launches"][-1] :])
        launches.append(describe_launch(steps))
    return launches_in_words(split_variance(launches))


def _check(options: RecipeOptions, num_nodes: int) -> None:
    for name in ("record", "checkpoint_dir", "trace"):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"repeats is {options.repeats} and {flag} names one place for all of them; leave "
                f"{flag} out"
            )
    if options.resume:
        raise ValueError(
            f"repeats is {options.repeats} and --resume goes on with one run; leave one of them out"
        )
    if launched_shape() is not None or num_nodes > 1:
        raise ValueError(
            f"repeats is {options.repeats} and torchrun or srun launches once; leave --repeats out "
            "and start that several times"
        )


def _once(arguments: Sequence[str]) -> list[str]:
    """The command line of a single launch."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--repeats":
            next(words)
        elif not word.startswith("--repeats="):
            kept.append(word)
    if "--config" in kept or any(word.startswith("--config=") for word in kept):
        kept += ["--repeats", "1"]  # a file may say otherwise
    return kept
