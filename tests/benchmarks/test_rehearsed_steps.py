"""Predicted collectives and memory of a step against those of rehearsals, on up to 512 ranks.

`pytest tests/benchmarks/test_rehearsed_steps.py --whole-proof` runs all cases. A case has a process
of its own, as a rehearsal on fake ranks sets up torch.distributed.
"""

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import bert, gpt, vit
from recipes.presets import Preset
from scaling.prediction.communication import AGREEMENT, collectives_of_step
from scaling.prediction.hardware import load_hardware
from scaling.prediction.memory import LARGEST_ERROR, LOWEST_ERROR, predict_memory
from tests.benchmarks.rehearsals import (
    LIMIT_BYTES,
    NODE,
    measure,
    predicted_sums,
    rehearsed_sums,
)
from tests.distributed.forking import begin_fork, fork_ranks
from unitransformer.config import ParallelConfig, RunConfig, Strategy
from unitransformer.rehearsal.rehearse import rehearse

RECIPES: dict[str, Preset] = {"bert": bert.PRESET, "gpt": gpt.PRESET, "vit": vit.PRESET}
# Rows that no number of ranks divides are padded; with 512 ranks, most ranks have none.
ODD = {"width": 36, "num_layers": 3, "num_heads": 2, "feedforward_width": 75}
TEXT = ODD | {"num_classes": 301, "num_positions": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt": TEXT,
    "bert": TEXT,
    "vit": ODD | {"image_size": 16, "patch_size": 8},
}
# Recipe, strategy, ranks in nodes of eight, and options.
COLLECTIVES: list[tuple[str, Strategy, int, dict[str, Any]]] = [
    ("gpt", "hsdp", 8, {"precision": "bf16-mixed", "accumulate": 2}),
    ("bert", "fsdp", 8, {"precision": "bf16-true"}),
    ("bert", "ddp", 8, {}),
    ("vit", "fsdp", 8, {}),
    ("gpt", "ddp", 64, {"precision": "bf16-mixed", "accumulate": 2}),
    ("gpt", "fsdp", 64, {"precision": "bf16-mixed"}),
    ("bert", "fsdp", 64, {"accumulate": 2}),
    ("vit", "hsdp", 64, {}),
    ("gpt", "ddp", 512, {}),
    ("vit", "fsdp", 512, {"precision": "bf16-mixed"}),
    ("bert", "hsdp", 512, {"precision": "bf16-true"}),
]
FAST = 2  # cases of collectives without `--whole-proof`
pytestmark = pytest.mark.timeout(3600)  # of all cases

# Recipe, size, strategy, ranks and samples per device.
MEMORY: list[tuple[str, str, Strategy, int, int]] = [
    (recipe, size, strategy, ranks, batch)
    for recipe, size in (("vit", "s"), ("bert", "reference"), ("bert", "base"), ("gpt", "124m"))
    for strategy, ranks in (("fsdp", 8), ("fsdp", 64), ("hsdp", 64), ("ddp", 8))
    for batch in (1, 4)
] + [("vit", "s", "fsdp", 512, batch) for batch in (1, 4)]
# Likewise, with activation checkpointing and a precision.
CHECKPOINTED: list[tuple[str, str, Strategy, int, int, str, str]] = [
    ("vit", "reference", "fsdp", 8, 16, "full", "bf16-mixed"),
    ("vit", "reference", "fsdp", 8, 1, "full", "bf16-mixed"),
    ("vit", "reference", "fsdp", 8, 16, "full", "32-true"),
    ("vit", "reference", "fsdp", 8, 16, "full", "bf16-true"),
    ("vit", "reference", "ddp", 8, 16, "full", "32-true"),
    ("vit", "s", "fsdp", 8, 16, "full", "bf16-mixed"),
    ("vit", "s", "fsdp", 8, 16, "selective", "bf16-mixed"),
    ("vit", "s", "ddp", 8, 4, "full", "bf16-mixed"),
    ("vit", "s", "ddp", 8, 16, "selective", "bf16-mixed"),
    ("vit", "b", "hsdp", 64, 16, "full", "bf16-mixed"),
    ("gpt", "reference", "ddp", 8, 1, "full", "bf16-mixed"),
    ("gpt", "reference", "fsdp", 8, 8, "full", "bf16-mixed"),
    ("gpt", "124m", "fsdp", 8, 4, "full", "bf16-mixed"),
    ("bert", "reference", "fsdp", 8, 1, "full", "bf16-mixed"),
    ("bert", "reference", "ddp", 8, 32, "full", "bf16-mixed"),
    ("bert", "reference", "fsdp", 8, 32, "selective", "bf16-mixed"),
]
# Recipe, size and ranks of rehearsals by command.
LARGEST = [("gpt", "reference", 8), ("gpt", "13b", 4096), ("bert", "large", 4096)]
LARGEST += [("vit", "g", 4096), ("gpt", "13b", 512)]
MEDIAN = 0.03  # of predicted / rehearsed - 1


def make_config(
    recipe: str, strategy: Strategy, ranks: int, options: dict[str, Any], **changes: Any
) -> RunConfig:
    preset, size = RECIPES[recipe], changes.pop("size", "reference")
    shape = SHAPES[recipe] if not changes else {}
    options = dict(options)
    return RunConfig(
        recipe=preset.recipe,
        size=size,
        model=preset.model_config(size, **shape),
        accumulate=options.pop("accumulate", 1),
        batch_size=changes.get("batch_size", 2),
        parallel=ParallelConfig(
            accelerator="cuda", devices=8, num_nodes=ranks // 8, strategy=strategy, **options
        ),
    )


def _rehearse(variables: Any, config: RunConfig, file: Path) -> None:
    begin_fork(variables)
    torch.set_num_threads(1)
    file.write_text(json.dumps(asdict(rehearse(config))))


def rehearsed(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The result of a rehearsal in a process of its own."""
    file = folder / "result.json"
    fork_ranks(_rehearse, config, file, world_size=1)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_predicted_collectives_are_those_of_a_rehearsal(
    tmp_path: Path, is_whole_proof: bool
) -> None:
    for recipe, strategy, ranks, options in COLLECTIVES if is_whole_proof else COLLECTIVES[:FAST]:
        config = make_config(recipe, strategy, ranks, options)
        result = rehearsed(config, tmp_path)
        # A callback of runs agrees to stop; both sides name its bytes.
        predicted = collectives_of_step(config, node_size=NODE)
        agreement = {c.of: c.total_bytes for c in predicted if c.of == AGREEMENT}
        assert agreement == result["unobserved_bytes"]
        case = (recipe, strategy, ranks, options)
        assert predicted_sums(config) == rehearsed_sums(result), case


def test_the_largest_models_are_rehearsed_in_four_gibibytes(is_whole_proof: bool) -> None:
    """`python -m tests.benchmarks.rehearsals` also shows how long they take, and its limit."""
    for recipe, size, ranks in LARGEST if is_whole_proof else LARGEST[:1]:
        found = measure(recipe, size, "fsdp", ranks)
        assert found.resident_bytes < LIMIT_BYTES, (recipe, size, ranks)
        assert predicted_sums(found.config) == rehearsed_sums(found.result), (recipe, size, ranks)


def test_predicted_memory_is_that_of_rehearsals(tmp_path: Path, is_whole_proof: bool) -> None:
    hardware = replace(load_hardware("h100-sxm-8"), context_bytes=0)
    errors = {}
    cases = [(*case, "off", "bf16-mixed") for case in MEMORY]
    for case in [*CHECKPOINTED, *cases] if is_whole_proof else [CHECKPOINTED[0], cases[0]]:
        recipe, size, strategy, ranks, batch, checkpointing, precision = case
        options = {"precision": precision, "activation_checkpointing": checkpointing}
        config = make_config(recipe, strategy, ranks, options, size=size, batch_size=batch)
        peak = rehearsed(config, tmp_path)["peak_bytes"]
        errors[case] = predict_memory(config, hardware).allocated_bytes / peak - 1
        print(f"{errors[case]:+.2%} {case}", flush=True)
    assert statistics.median(map(abs, errors.values())) <= MEDIAN
    assert max(map(abs, errors.values())) <= LARGEST_ERROR
    assert min(errors.values()) >= LOWEST_ERROR
