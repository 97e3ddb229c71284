"""Counters of a small run, counted in ranks that are forked from this process."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing

from tests.distributed.launching import RECIPES, free_port
from unitransformer.config import Compile, Precision, RunConfig, Strategy
from unitransformer.config import ParallelConfig as Parallel
from unitransformer.measuring.counting import count_run
from unitransformer.process import set_up_process

Counted = dict[str, dict[str, int]]
SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "feedforward_width": 32, "dropout": 0.0}
TEXT = SMALL | {"num_classes": 50, "num_positions": 8}
SHAPE: dict[str, dict[str, Any]] = {
    "bert": TEXT,
    "gpt": TEXT,
    "vit": SMALL | {"image_size": 16, "patch_size": 8},
}


def small_config(
    recipe: str,
    strategy: Strategy,
    *,
    mode: Compile = "off",
    precision: Precision = "32-true",
) -> RunConfig:
    """Four samples a rank; `single` is one rank, any other strategy two."""
    return RunConfig(
        recipe=recipe,  # type: ignore[arg-type]
        size="reference",
        model=RECIPES[recipe].PRESET.model_config("reference", **SHAPE[recipe]),
        batch_size=4,
        parallel=Parallel(
            accelerator="cpu",
            devices=1 if strategy == "single" else 2,
            strategy=strategy,
            compile=mode,
            precision=precision,
        ),
    )


def count(config: RunConfig, folder: Path, *, fault: Callable[[], None] | None = None) -> Counted:
    """The counters of rank 0.

    Args:
        fault: called in every rank before anything else, to plant a fault.
    """
    world_size = config.parallel.world_size
    launcher = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
    }
    torch.multiprocessing.start_processes(
        _count,
        args=(config, folder, fault, launcher if world_size > 1 else {}),
        nprocs=world_size,
        start_method="fork",
    )
    counted: Counted = json.loads((folder / "0.json").read_text())
    return counted


def _count(
    rank: int,
    config: RunConfig,
    folder: Path,
    fault: Callable[[], None] | None,
    launcher: dict[str, str],
) -> None:
    os.environ |= launcher
    if launcher:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if fault is not None:
        fault()
    set_up_process(config.parallel, "cpu")
    (folder / f"{rank}.json").write_text(json.dumps(count_run(config, run_dir=folder)))
