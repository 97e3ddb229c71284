"""No timed step synchronizes the GPU; torch raises an error if one does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import unitransformer.run
from recipes import bert, gpt, vit
from recipes.command_line import run_recipe
from unitransformer.launch.devices import has_bf16
from unitransformer.record.schema import load_record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_bf16()),
        reason="needs a CUDA device with bf16: the scaler of 16-mixed reads a value each step",
    ),
    # torch says this once per process.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
STEPS, FIRST, LAST = 20, 5, 15  # the first step may synchronize
TINY = [
    *("--model.width", "64", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.feedforward-width", "128", "--data", "synthetic", "--devices", "1"),
    *("--batch-size", "8", "--max-steps", str(STEPS), "--validate-every", str(STEPS)),
    *("--log-every", str(STEPS), "--validation-batches", "2", "--strategy", "single"),
]


class ForbidsSynchronization(pl.Callback):
    """Forbids synchronization during timed steps. Must be the last callback."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        refuses = FIRST <= trainer.global_step < LAST
        torch.cuda.set_sync_debug_mode("error" if refuses else "default")


@pytest.fixture
def _refused(monkeypatch: pytest.MonkeyPatch) -> Any:
    build_trainer = unitransformer.run.build_trainer

    def build(*arguments: Any, callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
        return build_trainer(
            *arguments, callbacks=[*callbacks, ForbidsSynchronization()], **options
        )

    monkeypatch.setattr(unitransformer.run, "build_trainer", build)
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_refused")
@pytest.mark.parametrize("module", [bert, gpt, vit], ids=["bert", "gpt", "vit"])
@pytest.mark.parametrize(
    "options", [[], ["--loss-chunk", "16"], ["--compile", "default"], ["--accumulate", "2"]]
)
def test_no_timed_step_synchronizes_the_gpu(
    module: Any, options: list[str], tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    arguments = [*TINY, *options, "--out", str(tmp_path), "--record", str(record)]
    assert run_recipe(module.PRESET, module.show, arguments) == 0
    assert len(load_record(record)["step_s"]) == STEPS


@pytest.mark.usefixtures("_refused")
def test_a_timed_step_that_reads_its_loss_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = unitransformer.run.TrainingModule.training_step

    def read_value(self: Any, *arguments: Any) -> torch.Tensor:
        loss = step(self, *arguments)
        assert loss.item() > 0
        return loss

    monkeypatch.setattr(unitransformer.run.TrainingModule, "training_step", read_value)
    record = tmp_path / "record.json"
    arguments = [*TINY, "--out", str(tmp_path), "--record", str(record)]
    assert run_recipe(gpt.PRESET, gpt.show, arguments) == 1
    assert "called a synchronizing CUDA operation" in load_record(record)["error"]["message"]
