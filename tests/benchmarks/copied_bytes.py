"""Counts the bytes that a real step reads and writes to copy weights and gradients."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.forking import begin_fork, fork_ranks
from unitransformer.config import RunConfig
from unitransformer.data.datamodule import DataModule
from unitransformer.data.sources import load_source
from unitransformer.launch.devices import set_up_process
from unitransformer.step_counters import COUNTED_STEP
from unitransformer.training.module import TrainingModule
from unitransformer.training.trainer import build_trainer


def _size(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_size, tensors))


# By operator: the bytes that it reads and writes, from its arguments, `out` and its result.
MOVED: dict[str, Callable[[Sequence[Any], Any, Any], int]] = {
    "aten.copy_.default": lambda args, out, result: _size(args[0]) + _size(args[1]),
    "aten._foreach_copy_.default": lambda args, out, result: _size(args[0]) + _size(args[1]),
    "aten._to_copy.default": lambda args, out, result: _size(args[0]) + _size(result),
    "aten.cat.default": lambda args, out, result: _size(args[0]) + _size(result),
    "aten.cat.out": lambda args, out, result: _size(args[0]) + _size(out),
    # A shard goes to its place in the gathered array.
    "fsdp.all_gather_copy_in.default": lambda args, out, result: 2 * _size(args[0]),
    "fsdp.split_with_sizes_copy.default": lambda args, out, result: _size(args[0]) + _size(out),
    "fsdp.chunk_cat.default": lambda args, out, result: _size(args[0]) + _size(out),
    # DDP: to a bucket.
    "aten.mul.out": lambda args, out, result: _size(args[0]) + _size(out),
    # DeepSpeed: the mean over ranks; a norm in float64, of which float32 would read half; overflow.
    "aten.div_.Tensor": lambda args, out, result: 2 * _size(args[0]),
    "aten.linalg_vector_norm.default": lambda args, out, result: (
        _size(args[0]) // 2 if args[0].element_size() == 8 else 0
    ),
    "aten.amax.default": lambda args, out, result: _size(args[0]),
    "aten.amin.default": lambda args, out, result: _size(args[0]),
}


class _Counter(TorchDispatchMode):
    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func) in MOVED:
            self.num_bytes += MOVED[str(func)](args, (kwargs or {}).get("out"), result)
        return result


class _CountCopies(pl.Callback):
    def __init__(self, config: RunConfig) -> None:
        self.first = COUNTED_STEP * config.accumulate  # micro-batch
        self.last = self.first + config.accumulate - 1
        self.counter = _Counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.first:
            self.counter.__enter__()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.last:
            self.counter.__exit__(None, None, None)


def count_copied_bytes(config: RunConfig, folder: Path) -> float:
    """Returns the bytes of the ranks' mean, per micro-batch."""
    ranks = config.parallel.world_size
    fork_ranks(_count, config, folder, world_size=ranks, num_nodes=config.parallel.num_nodes)
    counted = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return float(sum(counted) / ranks / config.accumulate)


def _count(variables: Mapping[str, str], config: RunConfig, folder: Path) -> None:
    begin_fork(variables)
    set_up_process(config.parallel, "cpu")
    steps = COUNTED_STEP + 1
    config = replace(
        config, max_steps=steps, optimizer=replace(config.optimizer, schedule_steps=steps)
    )
    counting = _CountCopies(config)
    trainer = build_trainer(config, run_dir=folder, callbacks=[counting], segment=0)
    trainer.limit_val_batches = 0
    trainer.fit(TrainingModule(config), datamodule=DataModule(config, load_source(config)))
    path = folder / f"{variables.get('RANK', 0)}.json"
    path.write_text(json.dumps(counting.counter.num_bytes))
