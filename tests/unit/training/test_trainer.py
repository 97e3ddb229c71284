"""Builds a trainer without warnings that do not apply to the run."""

from pathlib import Path

import pytest
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

from recipes import gpt
from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.training.trainer import build_trainer


@pytest.mark.parametrize("kind", [CUDAAccelerator, MPSAccelerator])
def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_gives_no_warning(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "is_available", lambda: True)
    config = RunConfig(
        recipe="gpt",
        size="reference",
        model=gpt.PRESET.model_config("reference", num_layers=1),
        parallel=ParallelConfig(accelerator="cpu", strategy="single"),
    )
    trainer = build_trainer(config, run_dir=tmp_path, callbacks=[], segment=0)
    assert trainer.strategy.root_device.type == "cpu"
