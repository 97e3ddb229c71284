"""Tests the record that a SLURM job writes for ranks that could not write one."""

import json
import shlex
from pathlib import Path

from recipes.service.failure_record import main
from unitransformer.launch.failures import unreported_failure, write_failure


def test_the_record_of_a_failure_holds_a_command_that_runs_it_again(tmp_path: Path) -> None:
    (tmp_path / "errors").mkdir()
    write_failure(unreported_failure(0, -9), tmp_path / "errors" / "0.failure")
    out = tmp_path / "it's my run"
    arguments = ["--accelerator", "cpu", "--max-steps", "1", "--out", str(out)]
    assert main(["gpt", str(tmp_path / "errors"), "0", "--", *arguments]) == 0
    (path,) = out.glob("*/*-1.json")
    command = json.loads(path.read_text())["command"]
    assert shlex.split(command) == ["python", "-m", "recipes.gpt", *arguments]
