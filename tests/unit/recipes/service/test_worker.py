"""Tests the process that runs many short trainings in forks."""

import multiprocessing
import os
from pathlib import Path

from recipes.service import worker


def test_the_log_of_a_run_is_no_executable_file(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    arguments = ("no recipe", [], str(log), {}, os.getpid())
    process = multiprocessing.get_context("fork").Process(target=worker._run, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 1
    assert log.stat().st_mode & 0o111 == 0
