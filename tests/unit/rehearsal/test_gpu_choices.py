"""Tests that fake CPU tensors keep what a GPU keeps for the backward pass."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from recipes import bert, gpt, vit
from recipes.presets import Preset
from unitransformer.config import DataConfig, ParallelConfig, RunConfig
from unitransformer.data.sources import Synthetic
from unitransformer.objectives import Objective
from unitransformer.parallel.activation_checkpointing import checkpoint_activations
from unitransformer.rehearsal.gpu_choices import gpu_choices
from unitransformer.rehearsal.observer import StepObserver
from unitransformer.rehearsal.rehearse import support_of_fakes
from unitransformer.transformer import Transformer

# Bytes kept when the loss is known, of fake CUDA tensors on torch 2.14.1+cu130: as in
# tests/unit/costs/test_memory.py, which measures them again where torch is built for GPUs.
KEPT: list[tuple[Preset, str, int, dict[str, Any], int]] = [
    (gpt.PRESET, "reference", 64, {}, 1_397_427_988),
    (gpt.PRESET, "124m", 8, {"activation_checkpointing": "full"}, 2_233_855_504),
    (gpt.PRESET, "124m", 8, {"activation_checkpointing": "selective"}, 3_748_523_824),
    (gpt.PRESET, "124m", 4, {"precision": "bf16-true"}, 2_047_131_952),
    (bert.PRESET, "base", 16, {}, 3_271_864_868),
    (bert.PRESET, "reference", 256, {}, 334_829_136),
    (vit.PRESET, "s", 16, {"precision": "16-mixed"}, 549_083_136),
]


@pytest.mark.parametrize(("preset", "size", "batch_size", "options", "kept"), KEPT)
def test_fake_cpu_tensors_keep_the_bytes_of_fake_gpu_tensors(
    preset: Preset, size: str, batch_size: int, options: dict[str, Any], kept: int
) -> None:
    config = RunConfig(
        recipe=preset.recipe,
        size=size,
        model=preset.model_config(size),
        batch_size=batch_size,
        data=DataConfig(source="synthetic"),
        parallel=ParallelConfig(**{"precision": "bf16-mixed", "accelerator": "cpu"} | options),
    )
    precision = config.parallel.precision
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    with torch.device("meta"):
        objective = Objective(Transformer(config.model))
    checkpoint_activations(objective, config.parallel.activation_checkpointing)
    with support_of_fakes(), gpu_choices(), FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        if precision == "bf16-true":
            objective.to(torch.bfloat16)
        indices = torch.zeros(batch_size, dtype=torch.long)
        samples = Synthetic(config, batch_size)
        batch = samples.fill({"inputs": indices, "targets": indices}, torch.device("cpu"))
        if precision == "bf16-true" and config.model.reads_images:
            batch["inputs"] = batch["inputs"].bfloat16()
        with StepObserver(objective) as observer:
            observer.begin_step("", batch, ())
            before = observer.live_bytes()
            with torch.autocast("cpu", dtype, enabled=precision.endswith("mixed")):
                loss = objective(batch)
                assert observer.live_bytes() - before == pytest.approx(kept, rel=0.001)
        assert loss.requires_grad
