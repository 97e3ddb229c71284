"""Trains a few steps as rank 0 of any number of ranks, on fake tensors and without other ranks.

Everything is built as in a run: the mesh, the strategy, sharding, checkpointing, precision, the
optimizer and Lightning's loop. Tensors have shapes and no numbers, and collectives send nothing.
"""

import contextlib
import gc
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import device_mesh
from torch.optim import optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes

from unitransformer.config import DataConfig, RunConfig
from unitransformer.data.sources import Synthetic
from unitransformer.objectives import Batch
from unitransformer.parallel import fsdp1, strategies
from unitransformer.rehearsal.fake_tensors import apply_to_fakes, outside_modes
from unitransformer.rehearsal.gpu_choices import gpu_choices
from unitransformer.rehearsal.observer import StepObserver, fsdp_groups
from unitransformer.rehearsal.reducer import reducer_of_fakes
from unitransformer.rehearsal.result import (
    AGREEMENT,
    AGREEMENT_BYTES,
    Rehearsal,
    describe_sharding,
    group_padding,
    sum_collectives,
)
from unitransformer.training.module import TrainingModule
from unitransformer.training.trainer import build_trainer
from unitransformer.transformer import Transformer


class _Done(Exception):
    """Ends the rehearsal after its last step."""


class _SyntheticBatches(pl.LightningDataModule):
    """Micro-batches of synthetic samples, made on the device."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config, self.samples = config, Synthetic(config, config.batch_size)

    def train_dataloader(self) -> "_SyntheticBatches":
        return self

    def val_dataloader(self) -> "_SyntheticBatches":  # never read: training ends before
        return self

    def __len__(self) -> int:
        return self.config.max_steps * self.config.accumulate

    def __iter__(self) -> Iterator[Batch]:
        indices = torch.zeros(self.config.batch_size, dtype=torch.long)
        for _ in range(len(self)):
            yield {"inputs": indices, "targets": indices}

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        return self.samples.fill(batch, device)


class _Observe(pl.Callback):
    """Observes the last two of `num_steps` optimizer steps, then ends training."""

    def __init__(self, config: RunConfig, num_steps: int) -> None:
        self.config, self.num_steps = config, num_steps
        self.observer: StepObserver | None = None
        self.result: Rehearsal | None = None
        self._micro_batch = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.observer is None:
            self.observer = StepObserver(pl_module)
            self.observer.__enter__()
            gc.disable()
        if self._micro_batch % self.config.accumulate == 0:
            step = self._micro_batch // self.config.accumulate
            task = {self.num_steps - 2: "search", self.num_steps - 1: "classify"}.get(step, "")
            self.observer.begin_step(task, batch, trainer.optimizers)
        self._micro_batch += 1

    def on_before_optimizer_step(self, *_: Any) -> None:
        assert self.observer is not None
        self.observer.begin_update()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._micro_batch % self.config.accumulate == 0:
            assert self.observer is not None
            self.observer.end_step()
            if self._micro_batch == self.num_steps * self.config.accumulate:
                self.result = self._result(pl_module)
                pl_module.stop_error = _Done()

    def _result(self, module: Any) -> Rehearsal:
        observer = self.observer
        assert observer is not None
        groups = [
            [
                (
                    parameter._orig_size,
                    parameter.fsdp_placement.dim,
                    group.mesh_info.shard_mesh_size,
                )
                for parameter in group.fsdp_params
            ]
            for child in module.modules()
            for group in fsdp_groups(child)
        ]
        is_parallel = self.config.parallel.world_size > 1
        return Rehearsal(
            world_size=self.config.parallel.world_size,
            peak_bytes=observer.peak_bytes,
            peak_place=observer.peak_place,
            bytes_by_category=observer.categories,
            collectives=sum_collectives(observer.collectives, group_padding(groups)),
            unobserved_bytes={AGREEMENT: AGREEMENT_BYTES} if is_parallel else {},
            parameters=describe_sharding(module.network),
        )

    def close(self) -> None:
        gc.enable()
        if self.observer is not None:
            self.observer.__exit__(None, None, None)


def observe_steps(config: RunConfig) -> Rehearsal:
    """Trains a few steps of a resolved config and returns what one of them needed.

    On real tensors and ranks, or on fake ones: as the caller has arranged.
    """
    # The first step creates the optimizer's state. DDP forms its buckets again in the third one at
    # the latest, also on one rank, which sends nothing.
    num_steps = (3 if config.parallel.strategy == "ddp" else 1) + 2
    config = replace(
        config,
        max_steps=num_steps,
        data=DataConfig(source="synthetic", sequence_length=config.data.sequence_length),
        validate_every=num_steps,
        until_interval=None,
    )
    observe = _Observe(config, num_steps)
    with tempfile.TemporaryDirectory() as folder:
        # Sharding a meta tensor over thousands of ranks is fast, and that of a fake one is not.
        is_sharded = config.parallel.is_sharded
        with _disable_current_modes() if is_sharded else contextlib.nullcontext():
            module = TrainingModule(config)
        trainer = build_trainer(config, run_dir=Path(folder), callbacks=[observe], segment=0)
        try:
            trainer.fit(module, datamodule=_SyntheticBatches(config))
        except _Done:
            pass
        finally:
            observe.close()
    assert observe.result is not None
    return observe.result


class RehearsalFailed(Exception):
    """What was rehearsed does not build or does not train; the cause is chained."""


def check_rehearsal(config: RunConfig) -> None:
    """Raises ValueError for what cannot be rehearsed."""
    parallel = config.parallel
    if parallel.uses_deepspeed:
        raise ValueError(
            f"strategy {parallel.strategy} cannot be rehearsed: DeepSpeed reads the memory of its "
            "parameters, and those of a rehearsal have none; choose fsdp, which shards as zero3"
        )
    if parallel.strategy == "fsdp1":
        raise ValueError(
            "strategy fsdp1 cannot be rehearsed: it moves all parameters of a layer into one, "
            "which has no shape of its own; choose fsdp, which shards the same layers"
        )
    if parallel.compile != "off":
        raise ValueError(
            f"compile {parallel.compile} cannot be rehearsed: kernels are built for real tensors; "
            "leave --compile out"
        )
    if parallel.cpu_offload:
        raise ValueError(
            "cpu-offload cannot be rehearsed: a rehearsal has one kind of memory; leave it out"
        )


def rehearse(config: RunConfig) -> Rehearsal:
    """Returns what one optimizer step of a config needs on rank 0, without its devices.

    Args:
        config: with the accelerator and the strategy decided.

    Raises:
        ValueError: it cannot be rehearsed.
        RehearsalFailed: it does not build, or a step fails.
    """
    check_rehearsal(config)
    parallel = config.parallel
    on_cpu = replace(config, parallel=replace(parallel, accelerator="cpu"))
    with contextlib.ExitStack() as stack:
        # Those of torch's internals, about fake tensors. A real run shows its own.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(_fake_ranks(parallel.world_size, parallel.devices))
        stack.enter_context(support_of_fakes())
        stack.enter_context(reducer_of_fakes())
        if parallel.accelerator == "cuda":
            stack.enter_context(gpu_choices())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        try:
            result = observe_steps(on_cpu)
        except Exception as error:
            raise RehearsalFailed(f"{type(error).__name__}: {error}") from error
    # Real ranks release tensors at times of their own; a rehearsal repeats itself exactly.
    assert sum(result.bytes_by_category.values()) == result.peak_bytes, "two steps were not equal"
    return result


@contextlib.contextmanager
def _fake_ranks(world_size: int, devices: int) -> Iterator[None]:
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(devices),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    with mock.patch.dict(os.environ, variables):
        torch.distributed.init_process_group(
            "fake", store=FakeStore(), rank=0, world_size=world_size
        )
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def support_of_fakes() -> Iterator[None]:
    """Makes torch and this package accept fake tensors where they look for real ones."""
    with contextlib.ExitStack() as stack:
        for module in (optimizer, _foreach_utils):  # torch looks for its exact types
            types = [*module._foreach_supported_types, FakeTensor, nn.Parameter]
            stack.enter_context(mock.patch.object(module, "_foreach_supported_types", types))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", apply_to_fakes))
        # Fake tensors hold no numbers.
        stack.enter_context(mock.patch.object(Transformer, "init_weights", _leave_empty))
        # A mesh reads its ranks, and shards of tensors without memory are made fast.
        for owner, name in (
            (device_mesh, "init_device_mesh"),
            (strategies, "init_device_mesh"),
            (fsdp1, "init_device_mesh"),
            (strategies, "fully_shard"),
        ):
            function = outside_modes(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def _leave_empty(*arguments: Any, **options: Any) -> None:
    """Replaces the initialization."""
