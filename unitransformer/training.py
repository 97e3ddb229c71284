"""Objective, optimizer and trainer put together. The order of wrappers is written here, once."""

import contextlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from unitransformer.checkpoints import PlainCheckpointIO
from unitransformer.compilation import compile_objective
from unitransformer.config import OptimizerConfig, RunConfig
from unitransformer.objectives import Batch, Objective, Score
from unitransformer.strategies import build_strategy, gather_network, shard
from unitransformer.transformer import Transformer


class TrainingModule(pl.LightningModule):
    """Trains an `Objective`; keeps the loss of every micro-batch on the device."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self._is_built = not config.parallel.is_sharded
        with torch.device("meta") if config.parallel.is_sharded else contextlib.nullcontext():
            network = Transformer(config.model, seed=config.seed)
        self.objective = Objective(network, loss_chunk=config.loss_chunk)
        compile_objective(
            self.objective, config.parallel.compile, by_layer=config.parallel.is_sharded
        )
        self._losses = torch.zeros(0)  # of this launch, one a micro-batch
        self._num_micro_batches = 0
        self.first_step = 0  # optimizer steps done by earlier launches
        self.validation: list[dict[str, float]] = []  # of every launch
        self._score: Score | None = None

    @property
    def network(self) -> Transformer:
        return self.objective.network

    def configure_model(self) -> None:
        # The order is: compile, then shard, so that a graph sees whole weights.
        if not self._is_built:
            self._is_built = True
            root = self.trainer.strategy.root_device
            shard(self.objective, self.config.parallel, root, self.config.seed)

    def whole_network(self) -> Transformer:
        """The network with all its weights on this rank; all ranks have to call this."""
        if self.config.parallel.is_sharded:
            return gather_network(self.network, self.device)
        return self.network

    def on_fit_start(self) -> None:
        # One tensor for all steps: a small one kept each step would split the freed logits it
        # lands in, and the next step's no longer fit there (seen: 30 MB a step on a CPU).
        steps = self.config.max_steps - self.first_step
        self._losses = torch.zeros(steps * self.config.accumulate, device=self.device)
        self._num_micro_batches = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.config.model.dropout:
            # Dropout is a function of seed, step and rank: a resumed step draws what it would have.
            torch.manual_seed(self.dropout_seed(self._num_micro_batches, rank=self.global_rank))
        loss: Tensor = self.objective(batch)
        self._losses[self._num_micro_batches] = loss.detach()
        self._num_micro_batches += 1
        return loss

    def dropout_seed(self, micro_batch: int, *, rank: int) -> int:
        """Another for every micro-batch since the very first step, and for every rank."""
        done = self.first_step * self.config.accumulate
        place = (done + micro_batch) * self.config.parallel.world_size + rank
        return (self.config.seed << 32) + place  # both are below 2**32

    def last_loss(self) -> float:
        """This rank's loss of the newest optimizer step; waits for the device."""
        end = self._num_micro_batches
        return float(self._losses[end - self.config.accumulate : end].mean())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        score = self.objective.score(batch)
        before = self._score
        self._score = score if before is None else Score(*map(torch.add, before, score))

    def on_validation_epoch_end(self) -> None:
        if self._score is None:
            return
        sums = torch.stack([part.double() for part in self._score])
        loss, correct, count = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self._score = None
        figures = {"val_loss": loss / count, "val_accuracy": correct / count}
        self.validation.append({"step": self.trainer.global_step, **figures})
        for logger in self.loggers:
            logger.log_metrics(figures, step=self.trainer.global_step)

    def losses(self) -> Tensor:
        """This launch's loss of every whole optimizer step, over micro-batches, on this rank."""
        accumulate = self.config.accumulate
        steps = self._num_micro_batches // accumulate
        return self._losses[: steps * accumulate].view(steps, accumulate).mean(dim=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A sharded run numbers the optimizer's states as the module does its parameters; so does
        # every other, that each may go on from each.
        if self.config.parallel.is_sharded:
            return
        place = {id(parameter): index for index, parameter in enumerate(self.parameters())}
        groups = self.trainer.optimizers[0].param_groups
        new_name = [place[id(parameter)] for group in groups for parameter in group["params"]]
        for saved in checkpoint["optimizer_states"]:
            saved["state"] = {new_name[old]: state for old, state in saved["state"].items()}
            for group in saved["param_groups"]:
                group["params"] = [new_name[old] for old in group["params"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning counts micro-batches; they may have been of another size when it was saved.
        done = self.first_step * self.config.accumulate
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            # As it stands in `on_train_batch_end`, where checkpoints are saved.
            counts.update(ready=done, started=done, processed=done, completed=done - 1)

    def configure_optimizers(self) -> Any:
        # A fused step would divide by float16's loss scale only after the clipping.
        is_fused = self.config.parallel.precision != "16-mixed"
        optimizer = build_optimizer(self.objective, self.config.optimizer, fused=is_fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_learning_rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own refuses a fused optimizer in bf16-mixed too, where nothing is scaled.
        if gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def _share_of_learning_rate(self, step: int) -> float:
        optimizer = self.config.optimizer
        highest = optimizer.learning_rate
        return optimizer.learning_rate_at(step) / highest if highest else 0.0


def build_optimizer(
    network: nn.Module, config: OptimizerConfig, *, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, none on biases, norms and single vectors."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if _is_matrix(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused,
    )


def _is_matrix(parameter: Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) >= 2


def build_trainer(
    config: RunConfig, *, device: str, run_dir: Path, callbacks: Sequence[pl.Callback], launch: int
) -> pl.Trainer:
    """A Trainer that does what `config` says and nothing on its own account.

    Args:
        device: "cpu" or "cuda", already found.
        launch: how often this run was started before; its CSV log has that number.
    """
    quieten_lightning()
    parallel, optimizer = config.parallel, config.optimizer
    return pl.Trainer(
        accelerator=device,
        devices=parallel.devices,
        num_nodes=parallel.num_nodes,
        strategy=build_strategy(parallel, device, accumulate=config.accumulate),
        precision=parallel.precision,
        max_steps=config.max_steps,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=optimizer.clip_norm or None,
        val_check_interval=config.validate_every * config.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=[
            CSVLogger(run_dir, name="csv", version=launch),
            TensorBoardLogger(run_dir, name="tensorboard", version=launch),
        ],
        log_every_n_steps=1,  # Lightning logs nothing here: `progress` does
        callbacks=list(callbacks),
        plugins=[PlainCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,  # Lightning's shuffles the training data by itself
        default_root_dir=run_dir,
    )


def quieten_lightning() -> None:
    """No banners: what a reader needs is printed by us."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*your dataloader is not resumable.*",  # ours begins at the step it is told
        ".*Checkpoint directory.*",
    ):
        warnings.filterwarnings("ignore", message)
