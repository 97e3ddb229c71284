"""What a command has started and what becomes of it when the command is killed at once."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from scaling.processes import start_worker
from scaling.tasks import ask

ARGUMENTS = ["--accelerator", "cpu", "--data", "synthetic", "--no-checkpoint"]


def ask_worker(folder: Path) -> None:
    """As a sweep does: the request waits in a pipe while the worker imports."""
    with start_worker(folder / "worker.log") as worker:
        worker("gpt", [*ARGUMENTS, "--out", str(folder)], log=folder / "log.txt", limit_s=60)


def ask_recipes(folder: Path) -> None:
    ask([{"recipe": "gpt", "arguments": ARGUMENTS}] * 50)


@pytest.mark.parametrize("asks", [ask_worker, ask_recipes])
@pytest.mark.parametrize("seconds", [0, 0.3, 1])
def test_what_imports_still_ends_with_the_command_that_has_started_it(
    asks: Callable[[Path], None], seconds: float, tmp_path: Path
) -> None:
    command = multiprocessing.get_context("fork").Process(target=asks, args=(tmp_path,))
    command.start()
    watched = psutil.Process(command.pid)
    while not (family := watched.children(recursive=True)):
        time.sleep(0.001)
    time.sleep(seconds)
    assert watched.is_running()
    command.kill()
    command.join()
    assert psutil.wait_procs(family, timeout=3)[1] == []
    assert not (tmp_path / "log.txt").exists()
