"""The same run several times over: every launch a process of its own, with a record of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from recipes.options import RUN_FOLDER, Options
from unitransformer.process import launched_shape
from unitransformer.records import load_record

if TYPE_CHECKING:
    from unitransformer.run import Places


def repeat(
    recipe: str, arguments: Sequence[str], options: Options, claim: Callable[[], "Places"]
) -> int:
    """Launch `options.repeats` times; returns the exit code of the first that fails, or 0.

    Args:
        arguments: the command line, `--repeats` too.
        claim: makes the folder of the next launch.

    Raises:
        ValueError: options that would put all launches into one place.
    """
    _check(options)
    command = [sys.executable, "-m", f"recipes.{recipe}", *_once(arguments)]
    launches = []
    for number in range(1, options.repeats + 1):
        places = claim()
        print(f"launch {number} of {options.repeats}", flush=True)
        variables = {**os.environ, RUN_FOLDER: str(places.folder)}
        code = subprocess.run(command, env=variables, check=False).returncode
        if code:
            return code if code > 0 else 128 - code
        launches.append(load_record(places.record))
    return 0


def _check(options: Options) -> None:
    for name in ("record", "checkpoint_dir"):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"repeats is {options.repeats} and {flag} names one place for all of them; leave "
                f"{flag} out"
            )
    if options.resume:
        raise ValueError(f"repeats is {options.repeats} with --resume, which is one launch")
    if launched_shape() is not None:
        raise ValueError(
            f"repeats is {options.repeats} inside one launch of torchrun or srun; start that "
            "several times"
        )


def _once(arguments: Sequence[str]) -> list[str]:
    """The command line without `--repeats`."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--repeats":
            next(words)
        elif not word.startswith("--repeats="):
            kept.append(word)
    return kept
