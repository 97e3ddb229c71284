"""Workers end when the command that started them is killed."""

import multiprocessing
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from scaling.recipe_process import _Worker, start_worker
from scaling.sweep.plan import open_planner
from tests.processes import wait_until_ended

ARGUMENTS = ["--accelerator", "cpu", "--data", "synthetic", "--no-checkpoint"]


def ask_worker(folder: Path) -> None:
    """Starts a worker as a sweep does: the request waits in a pipe while the worker imports."""
    with start_worker(folder / "worker.log") as worker:
        worker("gpt", [*ARGUMENTS, "--out", str(folder)], log=folder / "log.txt", limit_s=60)


def ask_recipes(folder: Path) -> None:
    with open_planner() as recipes:
        recipes.ask({"recipe": "gpt", "arguments": ARGUMENTS})


@pytest.mark.parametrize("asks", [ask_worker, ask_recipes])
@pytest.mark.parametrize("seconds", [0, 0.3, 1])
def test_a_worker_that_is_still_importing_ends_with_its_parent(
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
    wait_until_ended(family, timeout_s=30)  # a run that went on would take longer
    assert not (tmp_path / "log.txt").exists()


def test_a_worker_that_died_between_two_runs_is_restarted(tmp_path: Path) -> None:
    class Dead(_Worker):
        def _start(self) -> "subprocess.Popen[str]":
            pipe = subprocess.PIPE
            process = subprocess.Popen(["true"], stdin=pipe, stdout=pipe, text=True)
            process.wait()
            return process

    worker = Dead(tmp_path / "worker.log")
    worker.log.write_text("error: no memory left\n")
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"recipes.service.worker ended: error: no memory left"
        ):
            worker("gpt", [], log=tmp_path / "log.txt", limit_s=60)
