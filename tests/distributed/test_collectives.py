"""Tests calibration over two real ranks: one file, and failures that end all ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import psutil
import pytest
import torch

import tests.distributed.launching  # noqa: F401  (forks need what it has imported)
from tests.processes import PATIENCE_S, wait_until_ended
from unitransformer.calibrate import main
from unitransformer.machine import ceilings, collectives
from unitransformer.machine.alpha_beta import Collective
from unitransformer.machine.calibration_store import read_calibration

ARGUMENTS = ["--accelerator", "cpu", "--devices", "2", "--seconds", "1"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches the measurement for the ranks too, since they are forks."""
    monkeypatch.setattr(ceilings, "CPU_SHAPES", ((32, 32, 32), (64, 64, 64)))
    monkeypatch.setattr(ceilings, "_copy_bytes", lambda device: 2**20)
    monkeypatch.setitem(collectives.LARGEST_BYTES, "cpu", 2**16)


def test_two_ranks_measure_together_and_write_one_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calibration.json"
    assert main([*ARGUMENTS, "--out", str(path)]) == 0
    assert capfd.readouterr().out.split() == [str(path)]
    found = read_calibration(path)
    assert (found.num_ranks, len(found.ranks), found.dtypes) == (2, 2, ("float32", "bfloat16"))
    assert list(found.collectives) == list(get_args(Collective))
    for points in found.collectives.values():
        sizes = [point.size_bytes for point in points]
        assert sizes == [2**power for power in range(10, 10 + len(sizes))]
        assert len(sizes) >= 5
        assert all(len(point.seconds) >= 3 for point in points)
    fitted = [
        name for name, figures in found.metrics()["collectives"].items() if figures["alpha_s"]
    ]
    assert fitted  # a stall on a busy machine can spoil one point, not all


def test_a_failing_rank_ends_the_others_with_one_error_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("injected")
        time.sleep(60)

    monkeypatch.setattr(ceilings, "measure_ceiling", fail)
    assert main([*ARGUMENTS, "--out", str(tmp_path / "calibration.json")]) == 1
    actual = capfd.readouterr().err.splitlines()
    # Gloo may print another line, if the other rank was still connecting.
    assert [line for line in actual if not line.startswith("[E")] == [
        "error: rank 1 of 2: OutOfMemoryError: injected"
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_all_ranks_with_one_line_and_no_file(
    tmp_path: Path, repository: Path
) -> None:
    path = tmp_path / "calibration.json"
    arguments = ["--accelerator", "cpu", "--devices", "2", "--seconds", "600", "--out", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "scaling", "calibrate", *arguments],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background processes with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline_s = time.monotonic() + PATIENCE_S
    started: list[psutil.Process] = []  # the process that measures, then its two ranks
    while len(started) < 3 and time.monotonic() < deadline_s:
        started = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.05)
    assert len(started) >= 3
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, printed) == (1, "")
    assert errors.startswith("error: stopped before the end; unfinished results")
    assert errors.count("\n") == 1
    wait_until_ended(started)
    assert not path.exists()
