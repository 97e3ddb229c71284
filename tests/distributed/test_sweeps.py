"""Sweeps of real processes: what they leave, whatever ends them."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from scaling.outcomes import FILE, load_outcome
from scaling.store import load_store
from scaling.sweep import CELLS
from tests.distributed.launching import PICTURES, TEXT, TINY, environment


def sweep_command(out: Path, *words: str) -> list[str]:
    steps = TINY.index("--max-steps")
    tiny = [*TINY[:steps], *TINY[steps + 2 :]]
    return [sys.executable, "-m", "scaling", "sweep", "--out", str(out), *tiny, *words]


def outcomes(folder: Path) -> list[Any]:
    return [load_outcome(path) for path in sorted((folder / CELLS).glob(f"*/{FILE}"))]


def leftovers(folder: Path) -> list[psutil.Process]:
    """Processes with the environment of a test that still run."""
    return [
        process
        for process in psutil.process_iter(["environ"])
        if str(folder) in (process.info["environ"] or {}).get("UNITRANSFORMER_CACHE", "")
    ]


def test_every_way_to_end_has_its_status_and_the_sweep_goes_on(
    tmp_path: Path, repository: Path
) -> None:
    out = tmp_path / "sweep"
    # The vocabulary makes logits of 5 GiB out of 4,096 samples.
    words = ["--recipe", "gpt", *TEXT[2:], "--model.num-classes", "20000", "--max-steps", "6"]
    words += ["--data", "synthetic", "--batch-size", "2,4096,8192", "--devices", "1,2"]
    words += ["--strategy", "single,fsdp", "--memory-limit", "2GiB", "--recheck", "0"]
    done = subprocess.run(
        sweep_command(out, *words),
        cwd=repository, env=environment(tmp_path), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        tuple(o.options[axis] for axis in ("strategy", "devices", "batch-size")): o.status
        for o in outcomes(out)
    }
    assert {key: found[key] for key in found if key[2] == "2"} == {
        ("single", "1", "2"): "ok",
        ("single", "2", "2"): "refused",
        ("fsdp", "1", "2"): "ok",
        ("fsdp", "2", "2"): "ok",
    }
    large = [status for (strategy, _, size), status in found.items() if size == "8192"]
    assert sorted(large) == ["oom-inferred"] * 3 + ["refused"]
    assert "12 cells finished" in done.stdout
    store = load_store([out], relative_to=out)
    assert len(store.cells) == 12
    assert [cell.run is not None for cell in store.cells if cell.outcome.status == "ok"] == [
        True
    ] * 3
    assert not leftovers(tmp_path)


def test_a_cell_that_takes_too_long_is_ended_whole(tmp_path: Path, repository: Path) -> None:
    out = tmp_path / "sweep"
    words = ["--recipe", "vit", *PICTURES, "--max-steps", "100000", "--devices", "2"]
    words += ["--strategy", "ddp", "--time-limit", "12"]
    done = subprocess.run(
        sweep_command(out, *words),
        cwd=repository, env=environment(tmp_path), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    (outcome,) = outcomes(out)
    assert outcome.status == "timeout"
    assert outcome.reason == "did not end within 12 s"
    assert outcome.elapsed_s < 12 + 10
    assert any("step" in line for line in outcome.last_lines)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_ended_leaves_no_process_and_no_half_cell(
    number: signal.Signals, tmp_path: Path, repository: Path
) -> None:
    out = tmp_path / "sweep"
    words = ["--recipe", "vit", *PICTURES, "--max-steps", "100000", "--devices", "2"]
    sweep = subprocess.Popen(
        sweep_command(out, *words, "--strategy", "ddp,fsdp"),
        cwd=repository, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not any("step" in log.read_text() for log in (out / CELLS).glob("*/log.txt")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(sweep.pid).children(recursive=True)
        assert len(family) >= 4  # the worker, its fork, and two ranks
        sweep.send_signal(number)
        output, _ = sweep.communicate(timeout=30)
    finally:
        sweep.kill()
    _, left = psutil.wait_procs(family, timeout=10)
    assert left == []
    assert outcomes(out) == []
    if number != signal.SIGKILL:
        assert sweep.returncode == 1
        assert b"stopped before the end" in output
