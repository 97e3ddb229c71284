"""Tests that a rehearsal needs the bytes and the collectives of real ranks, which use gloo."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from recipes import gpt
from tests.distributed.forking import begin_fork, fork_ranks
from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.launch.devices import set_up_process
from unitransformer.profiling.collective_waits import wait_for_release
from unitransformer.rehearsal.rehearse import observe_steps, rehearse

# Rows that two and four ranks do not divide are padded.
SHAPE = {"width": 36, "num_layers": 3, "num_heads": 2, "feedforward_width": 75, "num_classes": 301}


def make_config(**parallel: Any) -> RunConfig:
    return RunConfig(
        recipe="gpt",
        size="reference",
        model=gpt.model_config("reference", num_positions=8, **SHAPE),
        batch_size=4,
        parallel=ParallelConfig(accelerator="cpu", **parallel),
    )


def _train(variables: Mapping[str, str], config: RunConfig, folder: Path, is_real: bool) -> None:
    begin_fork(variables)
    set_up_process(config.parallel, "cpu")
    with wait_for_release():  # gloo frees tensors a moment later
        result = observe_steps(config) if is_real else rehearse(config)
    if variables.get("RANK", "0") == "0":
        (folder / f"{is_real}.json").write_text(json.dumps(asdict(result)))
    os._exit(0)


@pytest.mark.parametrize(
    ("parallel", "accumulate"),
    [
        ({"strategy": "single"}, 1),
        ({"strategy": "ddp"}, 1),
        ({"strategy": "ddp", "devices": 2}, 2),
        ({"strategy": "ddp", "devices": 4}, 1),
        ({"strategy": "fsdp", "devices": 2, "activation_checkpointing": "full"}, 1),
        ({"strategy": "fsdp", "devices": 4, "precision": "bf16-mixed"}, 1),
        ({"strategy": "hsdp", "devices": 2, "num_nodes": 2}, 1),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_a_rehearsal_equals_real_ranks_to_the_byte(
    parallel: dict[str, Any], accumulate: int, tmp_path: Path
) -> None:
    config = replace(make_config(**parallel), accumulate=accumulate)
    shape = config.parallel
    for is_real, world_size in ((True, shape.world_size), (False, 1)):
        nodes = shape.num_nodes if is_real else 1
        fork_ranks(_train, config, tmp_path, is_real, world_size=world_size, num_nodes=nodes)
    real, rehearsed = (json.loads((tmp_path / f"{x}.json").read_text()) for x in (True, False))
    for name in ("collectives", "parameters", "peak_place"):
        assert rehearsed[name] == real[name], name
    # The reducer in C++ holds a last gradient a moment longer.
    tolerance = 1e-3 if shape.strategy == "ddp" else 0
    assert rehearsed["peak_bytes"] == pytest.approx(real["peak_bytes"], rel=tolerance)
