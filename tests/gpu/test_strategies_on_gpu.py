"""Every strategy trains the same model on one real GPU: compiled, in bf16, and offloaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scaling.parity.cases import STRATEGIES
from unitransformer.record.schema import load_record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = [
    *("--model.width", "64", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.feedforward-width", "128", "--model.num-classes", "1000", "--dropout", "0"),
    *("--devices", "1", "--batch-size", "8", "--max-steps", "20", "--precision", "32-true"),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Trains in a new process, since a process group lives as long as its process."""
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def train(folder: Path, *options: str) -> dict[str, Any]:
    record = folder / "record.json"
    run("recipes.gpt", *SMALL, *options, "--out", str(folder), "--record", str(record))
    return load_record(record)


@pytest.mark.parametrize("recipe", ["bert", "gpt", "vit"])
def test_all_strategies_hold_a_certificate_on_one_gpu(recipe: str, tmp_path: Path) -> None:
    options = ("--recipe", recipe, "--devices", "1", "--accelerator", "cuda", "--quick")
    run("scaling", "parity", *options, "--out", str(tmp_path))
    certificate = json.loads(next(tmp_path.glob("parity-*.json")).read_text())
    verdicts: dict[str, set[str]] = {strategy: set() for strategy in STRATEGIES}
    for case in certificate["cases"]:
        verdicts[case["strategy"]].add(case["verdict"])
    for strategy, found in verdicts.items():
        assert "equal" in found, strategy
        assert found <= {"equal", "refused"}, strategy


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp1", "zero2", "zero3"])
def test_offloading_to_host_memory_trains_the_same_model(strategy: str, tmp_path: Path) -> None:
    kept = train(tmp_path / "kept", "--strategy", strategy)
    offloaded = train(tmp_path / "offloaded", "--strategy", strategy, "--cpu-offload")
    assert offloaded["loss"] == pytest.approx(kept["loss"], rel=1e-4)
    assert max(offloaded["peak_bytes"]) < max(kept["peak_bytes"])


def test_a_checkpoint_written_during_training_can_be_resumed(tmp_path: Path) -> None:
    folder = ("--checkpoint-dir", str(tmp_path / "checkpoints"), "--checkpoint-every", "5")
    whole = train(tmp_path / "whole", "--strategy", "fsdp")
    train(tmp_path / "first", "--strategy", "fsdp", *folder, "--max-steps", "10")
    rest = train(tmp_path / "rest", "--strategy", "ddp", *folder, "--resume")
    assert rest["loss"] == pytest.approx(whole["loss"], rel=1e-4)
