"""Build_trainer: the trainer, its loggers and quiet defaults."""

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from unitransformer.config import RunConfig
from unitransformer.launch.signals import defer_interrupt
from unitransformer.parallel.strategies import build_precision, build_strategy


class InterruptSafeTensorBoardLogger(TensorBoardLogger):
    """A queue to TensorBoard's thread that is left while something is put into it never ends, and
    closing waits for that."""

    def log_metrics(self, *arguments: Any, **options: Any) -> None:
        with defer_interrupt():
            super().log_metrics(*arguments, **options)

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        with defer_interrupt():
            super().log_hyperparams(*arguments, **options)


def build_trainer(
    config: RunConfig, *, device: str, run_dir: Path, callbacks: Sequence[pl.Callback], launch: int
) -> pl.Trainer:
    """A Trainer that does what `config` says and nothing on its own account.

    Args:
        device: "cpu" or "cuda", already found.
        launch: how often this run was started before; its CSV log has that number.
    """
    quiet_lightning()
    parallel, optimizer = config.parallel, config.optimizer
    precision = build_precision(parallel, device)
    trainer = pl.Trainer(
        accelerator=device,
        devices=parallel.devices,
        num_nodes=parallel.num_nodes,
        strategy=build_strategy(config, device),
        precision=parallel.precision if precision is None else None,
        max_steps=config.max_steps,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=optimizer.clip_norm or None,
        val_check_interval=config.validate_every * config.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=[
            CSVLogger(run_dir, name="csv", version=launch),
            InterruptSafeTensorBoardLogger(run_dir, name="tensorboard", version=launch),
        ],
        log_every_n_steps=1,  # Lightning logs nothing here: `progress` does
        callbacks=list(callbacks),
        plugins=[_cluster(), *([] if precision is None else [precision])],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,  # Lightning's shuffles the training data by itself
        default_root_dir=run_dir,
    )
    # Lightning's own asks all ranks in every micro-batch, and waits for the device each time; its
    # handler talks to other ranks, which may be waiting for this one. `stopping` does neither.
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    return trainer


def _cluster() -> ClusterEnvironment:
    # Said, not found out: inside a batch job Lightning would take any process for a task of srun.
    return TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()


def quiet_lightning() -> None:
    """No banners: what a reader needs is printed by us."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*srun. command is available on your system but is not used.*",  # that is all right
        ".*CUDA is not available or torch_xla is imported. Disabling autocast.*",  # FSDP1 casts
        ".*DeepSpeed handles gradient clipping.*",  # and ours leaves it to DeepSpeed
        ".*torch.distributed.(all_gather_into|reduce_scatter)_tensor. is deprecated.*",  # as well
        ".*your dataloader is not resumable.*",  # ours begins at the step it is told
    ):
        warnings.filterwarnings("ignore", message)
