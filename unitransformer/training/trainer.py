"""Builds the Lightning Trainer with its loggers, without Lightning's own output."""

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from unitransformer.config import RunConfig
from unitransformer.launch.signals import defer_interrupt
from unitransformer.parallel.strategies import build_precision, build_strategy


class InterruptSafeTensorBoardLogger(TensorBoardLogger):
    """Delays Ctrl-C during a write: inside a queue's put it would hang TensorBoard's thread."""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        with defer_interrupt():
            super().log_metrics(*args, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        with defer_interrupt():
            super().log_hyperparams(*args, **kwargs)


def build_trainer(
    config: RunConfig, *, run_dir: Path, callbacks: Sequence[pl.Callback], segment: int
) -> pl.Trainer:
    """Returns a Trainer without Lightning's own checkpoints, progress bar and signal handlers.

    Args:
        config: resolved, so that its accelerator is "cpu" or "cuda".
        segment: how often this run was resumed; the version of its logs.
    """
    quiet_lightning()
    parallel, device = config.parallel, config.parallel.accelerator
    precision = build_precision(parallel, device)
    # Chosen here because inside a batch job Lightning would assume that srun started this process.
    cluster = TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()
    trainer = pl.Trainer(
        accelerator=device,
        devices=parallel.devices,
        num_nodes=parallel.num_nodes,
        strategy=build_strategy(config, device),
        precision=parallel.precision if precision is None else None,
        max_steps=config.max_steps,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.optimizer.clip_norm or None,
        val_check_interval=config.validate_every * config.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=[
            CSVLogger(run_dir, name="csv", version=segment),
            InterruptSafeTensorBoardLogger(run_dir, name="tensorboard", version=segment),
        ],
        log_every_n_steps=1,  # Lightning logs nothing itself: `progress` does
        callbacks=list(callbacks),
        plugins=[cluster, *([] if precision is None else [precision])],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,  # the data module shards the samples
        default_root_dir=run_dir,
    )
    # Lightning would exchange signals in every micro-batch, which waits for the device, and its
    # handler communicates with ranks that may be waiting for this one. `stop` does neither.
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    _free_before_teardown(trainer.strategy)
    return trainer


def _free_before_teardown(strategy: Any) -> None:
    """Frees gradients and moments when training ends or fails: checkpoints are saved by then.

    Lightning would copy them to the host, 12 bytes per parameter and rank, before the record is
    written. A limit of host memory would end the run there.
    """
    teardown = strategy.teardown

    def free_and_tear_down() -> None:
        for optimizer in strategy.optimizers:
            getattr(optimizer, "optimizer", optimizer).state.clear()  # DeepSpeed wraps it
        for parameter in [] if strategy.model is None else strategy.model.parameters():
            parameter.grad = None
        teardown()

    strategy.teardown = free_and_tear_down


def quiet_lightning() -> None:
    """Hides Lightning's banners, and warnings that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",  # the config decides
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*srun. command is available on your system but is not used.*",
        ".*CUDA is not available or torch_xla is imported. Disabling autocast.*",  # FSDP1 casts
        ".*DeepSpeed handles gradient clipping.*",  # the training module leaves it to DeepSpeed
        ".*torch.distributed.(all_gather_into|reduce_scatter)_tensor. is deprecated.*",  # DeepSpeed
        ".*your dataloader is not resumable.*",  # the sampler starts at `start_step`
    ):
        warnings.filterwarnings("ignore", message)
