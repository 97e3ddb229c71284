"""Ranks that torchrun restarts after a failure continue from their newest checkpoint."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes import gpt
from recipes.command_line import run_recipe
from tests.distributed.faults import inject
from tests.distributed.forking import begin_fork
from tests.distributed.launching import (
    environment,
    load,
    recipe_arguments,
    torchrun_two_ranks,
    train,
)
from tests.processes import PATIENCE_S
from unitransformer.checkpoint.reader import list_checkpoints

STEPS = 12
OPTIONS = ("--batch-size", "4", "--max-steps", str(STEPS), "--checkpoint-every", "2")
# torchrun starts this as a command. The fault kills rank 1 in step 6, once.
MORTAL_RECIPE = """
import sys
from pathlib import Path
from tests.distributed.test_restarts import train_until_killed

sys.exit(train_until_killed(Path(sys.argv[1]), sys.argv[2:]))
"""

pytestmark = pytest.mark.usefixtures("_no_orphans")


def train_until_killed(folder: Path, arguments: list[str]) -> int:
    """Trains; the first time, rank 1 dies in step 6, after the checkpoint of step 4 is complete."""

    def die() -> None:
        if (folder / "died").exists():
            return
        while not any(list_checkpoints(path)[1:] for path in folder.glob("*/checkpoints")):
            time.sleep(0.02)
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    inject(5, die)()
    return run_recipe(gpt.PRESET, gpt.show, arguments)


def train_in_fork(folder: Path, arguments: list[str]) -> None:
    begin_fork({})
    if code := train_until_killed(folder, arguments):
        raise SystemExit(code)


def check(folder: Path, tmp_path: Path, strategy: str) -> None:
    """Asserts that the run of two attempts equals one without a failure."""
    whole = train("gpt", tmp_path / "whole", *OPTIONS, "--devices", "2", "--strategy", strategy)
    record = load(folder)
    assert record["status"] == "ok"
    assert record["segment_starts"][0] == 0
    assert len(record["segment_starts"]) == 2
    assert record["segment_starts"][1] >= 4
    assert record["loss"] == whole["loss"]
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1, "one folder for both"


@pytest.mark.proof  # The ranks are new interpreters; in the next test they are forks.
def test_torchrun_restarts_a_run_that_resumes_from_its_checkpoint(
    tmp_path: Path, repository: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    (tmp_path / "mortal.py").write_text(MORTAL_RECIPE)
    arguments = recipe_arguments("gpt", folder, *OPTIONS, "--resume", "auto")
    done = subprocess.run(
        [sys.executable, *torchrun, "--master-port", port, tmp_path / "mortal.py", folder]
        + arguments,
        env=environment(tmp_path) | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "resume  " in done.stdout
    check(folder, tmp_path, "ddp")


@pytest.mark.parametrize(
    ("strategy", "num_nodes", "backend"),
    [("fsdp", 1, "static"), ("zero2", 1, "static"), ("ddp", 2, "c10d")],
)
def test_restarted_ranks_resume_under_every_kind_of_strategy_and_rendezvous(
    strategy: str, num_nodes: int, backend: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    arguments = recipe_arguments("gpt", folder, *OPTIONS, "--strategy", strategy)
    codes, logs = torchrun_two_ranks(
        *(tmp_path, train_in_fork, folder, arguments),
        num_nodes=num_nodes,
        backend=backend,
        max_restarts=1,
        start_method="fork",
    )
    assert codes == [0] * num_nodes, logs[0].read_text()[-4000:]
    check(folder, tmp_path, strategy)
