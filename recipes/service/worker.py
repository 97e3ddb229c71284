"""Runs many short trainings in forks of one process: `python -m recipes.service.worker`.

The process imports everything once. Each line of standard input asks for a run on CPUs: {"recipe":
"gpt", "arguments": ["--max-steps", "20"], "log": "run.log", "limit_s": 600, "memory_limit_bytes":
null, "variables": {}}. The run gets these environment variables, and its output goes to the log.
A line of standard output answers: {"ending": "ended", "exit_code": 0, "elapsed_s": 2.5}. The exit
code is null for a run that exceeded the limit that "ending" names, and negative for a signal.
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
from types import MappingProxyType
from typing import Any

from recipes.command_line import run_recipe
from recipes.service.plan import PRESETS
from unitransformer.cli import run_main
from unitransformer.launch.gc_pause import heavy_import
from unitransformer.launch.process_tree import die_with_parent, wait_within
from unitransformer.launch.signals import STOP_SIGNALS

# Modules that a run imports, some of them late.
HEAVY: tuple[str, ...] = (
    "recipes.train",
    "recipes.showcase",
    "unitransformer.plots",
    "tensorboard.summary",
)
HEAVY += ("torch._dynamo", "torch._inductor.compile_fx")


def main() -> int:
    """Answers until standard input ends; returns the exit code."""
    # A batch system signals every process. The sweep reacts to that and then ends this process.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Standard output carries answers alone: what libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # A pool of compile processes per fork costs more time than it saves.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with heavy_import("recipes.train"):
        from unitransformer.parallel.deepspeed import prepare_deepspeed

        for name in HEAVY:
            importlib.import_module(name)
        with contextlib.suppress(ImportError):  # the recipe reports that it is missing
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
    die_with_parent(parent)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.environ |= variables
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(run_main(lambda: run_recipe(PRESETS[recipe], lambda *_: [], arguments)))


if __name__ == "__main__":
    sys.exit(main())
