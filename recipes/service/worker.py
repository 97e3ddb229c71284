"""Many short runs from one process that imported everything: `python -m recipes.service.worker`.

A line of JSON on standard input asks for a run: {"recipe": "gpt", "arguments": ["--max-steps",
"20"], "log": "run.log", "limit_s": 600, "memory_limit_bytes": null, "variables": {}}. The run
happens in a fork, on CPUs, with these environment variables, and what it prints goes into the log.
A line of JSON on standard output answers: {"ending": "ended", "exit_code": 0, "elapsed_s": 2.5};
the exit code is null for a run that passed a limit, which the ending names, and negative for a
signal.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from recipes.command_line import run_recipe
from recipes.service.plan import PRESETS
from unitransformer.launch.gc_pause import heavy_import
from unitransformer.launch.process_tree import die_with_parent, wait_within
from unitransformer.launch.signals import STOP_SIGNALS

if TYPE_CHECKING:
    pass

# What a run imports, some of it late.
HEAVY = (
    "recipes.train",
    "tensorboard.summary",
    "torch._dynamo",
    "torch._inductor.compile_fx",
)


def main() -> int:
    """Answer until nothing more is asked; returns the exit code."""
    # A batch system sends them to every process. It is for the sweep to stop, and then this ends.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # What a library prints is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # A pool of compiling processes for every fork costs more than it gains.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with heavy_import("recipes.train"):
        from unitransformer.parallel.deepspeed import prepare_deepspeed

        for name in HEAVY:
            importlib.import_module(name)
        with contextlib.suppress(ImportError):  # the recipe says that it is not there
            prepare_deepspeed("cpu")
    for line in sys.stdin:
        print(json.dumps(_answer(**json.loads(line))), file=answers, flush=True)
    return 0


def _answer(
    recipe: str,
    arguments: Sequence[str],
    log: str,
    limit_s: float,
    memory_limit_bytes: int | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    started_s = time.monotonic()
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(recipe, arguments, log, variables, os.getpid())
    )
    process.start()
    assert process.pid is not None

    def wait(seconds: float) -> bool:
        process.join(seconds)
        return not process.is_alive()

    ending = wait_within(process.pid, wait, limit_s=limit_s, memory_limit_bytes=memory_limit_bytes)
    process.join()
    return {
        "ending": ending,
        "exit_code": process.exitcode if ending == "ended" else None,
        "elapsed_s": time.monotonic() - started_s,
    }


def _run(
    recipe: str, arguments: Sequence[str], log: str, variables: Mapping[str, str], parent: int
) -> None:
    """What a fork does."""
    die_with_parent(parent)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.environ |= variables
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.exit(run_recipe(PRESETS[recipe], _show_nothing, arguments))


def _show_nothing(outcome: "Outcome", folder: Path) -> list[str]:
    """No figures: whoever asks for many runs reads records."""
    return []


if __name__ == "__main__":
    sys.exit(main())
