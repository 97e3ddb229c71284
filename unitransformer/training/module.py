"""The LightningModule: loss and validation around one `Objective`.

It also decides the order in which the network is wrapped: checkpointing, compilation, sharding.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.machine.loss_blocks import LossBlocks, choose_loss_blocks
from unitransformer.objectives import Batch, Objective, Score
from unitransformer.parallel import deepspeed
from unitransformer.parallel.activation_checkpointing import checkpoint_activations
from unitransformer.parallel.compile import compile_objective
from unitransformer.parallel.strategies import (
    clip_gradients,
    gather_network,
    shard,
)
from unitransformer.training.optimizer import build_optimizer
from unitransformer.transformer import Transformer
from unitransformer.weights import read_weights

MAX_GATHERED_BYTES = 2 * 2**30  # larger sharded networks are not gathered after training


class TrainingModule(pl.LightningModule):
    """Trains an `Objective`; keeps the loss of every micro-batch on the device."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        parallel = config.parallel
        with torch.device("meta"):
            network = Transformer(config.model)
        self.objective = Objective(
            network,
            loss_chunk=config.loss_chunk,
            loss_block=config.loss_block or 0,
            num_logits=config.num_logits,
        )
        # Checkpoint, compile, shard: graphs must contain the recomputation and see full weights.
        checkpoint_activations(self.objective, parallel.activation_checkpointing)
        compile_objective(self.objective, parallel.compile, by_layer=parallel.is_sharded)
        self.initial_weights = (
            network.initial_weights(config.seed)
            if config.init_from is None
            else read_weights(Path(config.init_from), config.model)
        )
        if not parallel.is_sharded:
            # `to_empty` would ask the meta tensors, for which torch imports sympy.
            self.objective._apply(  # type: ignore[no-untyped-call]
                lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu")
            )
            network.init_weights(self.initial_weights)
        self.loss_blocks: LossBlocks | None = None  # known when training starts
        self.resumed_loss_blocks: LossBlocks | None = None  # of the run that this one resumes
        self._losses = torch.zeros(0)  # one per micro-batch of this segment
        self._gradient_norms = torch.zeros(0)  # one per optimizer step of this segment
        self._num_micro_batches = 0
        self.first_step = 0  # optimizer steps done by earlier segments
        self.validation: list[dict[str, float]] = []  # of all segments
        self.has_diverged = False  # this rank has read a loss that is not finite
        self.stop_error: Exception | None = None  # all ranks raise it at the end of this step
        self._has_ended = False
        self._score: Score | None = None
        # The full network after training. In a list, so that it does not become a submodule.
        self._gathered: list[Transformer] = []

    @property
    def network(self) -> Transformer:
        return self.objective.network

    def configure_model(self) -> None:
        if self.config.parallel.is_sharded:
            shard(self.objective, self.config.parallel, self.trainer.strategy, self.initial_weights)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.stop_error is not None:  # after a signal, the callbacks have saved a checkpoint
            raise self.stop_error

    def on_fit_end(self) -> None:
        if not self._has_ended:  # Lightning skips `on_train_end` when no step is left
            self.on_train_end()

    def on_train_end(self) -> None:
        # Validate and gather now: Lightning tears the strategy down after this hook.
        self._has_ended = True
        last = self.validation[-1]["step"] if self.validation else 0
        if last != self.trainer.global_step:
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True
        is_small = 4 * count_parameters(self.config.model) <= MAX_GATHERED_BYTES
        if self.config.parallel.is_sharded and is_small:
            model = self.trainer.strategy.model
            assert model is not None
            self._gathered.append(gather_network(model, self.network, self.config.parallel))

    def set_loss_blocks(self, blocks: LossBlocks) -> None:
        """Decides how many logits the loss computes at once, before the first step."""
        self.loss_blocks = blocks
        self.objective.loss_chunk, self.objective.loss_block = blocks.rows, blocks.columns

    @property
    def full_network(self) -> Transformer | None:
        """The network with all its weights on rank 0, or None if too large to be gathered."""
        if self.config.parallel.is_sharded:
            return self._gathered[0] if self._gathered else None
        return self.network

    def on_fit_start(self) -> None:
        # Rank 0 decides for all, so that they compute the same sums.
        blocks = None
        if self.global_rank == 0:
            blocks = choose_loss_blocks(self.config, self.resumed_loss_blocks)
        blocks = self.trainer.strategy.broadcast(blocks)
        assert blocks is not None, "rank 0 has chosen"
        self.set_loss_blocks(blocks)
        # One tensor for all steps: a small tensor per step would fragment the memory of the freed
        # logits, and the next logits would not fit there (measured: 30 MB per step on a CPU).
        steps = self.config.max_steps - self.first_step
        self._losses = torch.zeros(steps * self.config.accumulate, device=self.device)
        self._gradient_norms = torch.zeros(steps, device=self.device)
        parallel = self.config.parallel
        is_rounded = parallel.uses_deepspeed and parallel.precision != "32-true"
        if is_rounded and self.first_step == 0:  # a checkpoint restores float32 weights
            deepspeed.set_weights(self.network, self.initial_weights)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self._num_micro_batches % self.config.accumulate == 0:
            # Computed from the step, so that a checkpoint does not need a scheduler.
            rate = self.config.optimizer.learning_rate_at(self.first_step + self._num_steps)
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = rate
        if self.config.model.dropout:
            # Dropout depends on seed, step and rank alone, so that a resumed run repeats it.
            torch.manual_seed(self.dropout_seed(self._num_micro_batches, rank=self.global_rank))
        loss: Tensor = self.objective(batch)
        self._losses[self._num_micro_batches] = loss.detach()
        self._num_micro_batches += 1
        return loss

    @property
    def _num_steps(self) -> int:
        """Optimizer steps of this segment whose micro-batches are all counted."""
        return self._num_micro_batches // self.config.accumulate

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        is_step = self._num_micro_batches % self.config.accumulate == 0
        if is_step and self.config.parallel.uses_deepspeed and self.config.optimizer.clip_norm:
            engine: Any = self.trainer.strategy.model
            self._gradient_norms[self._num_steps - 1] = engine.get_global_grad_norm()

    def gradient_norms(self) -> Tensor:
        """Returns the norms before clipping of this segment's steps; empty without clipping."""
        return self._gradient_norms[: self._num_steps if self.config.optimizer.clip_norm else 0]

    def dropout_seed(self, micro_batch: int, *, rank: int) -> int:
        """Returns a seed that differs for every micro-batch of the run and every rank."""
        done = self.first_step * self.config.accumulate
        index = (done + micro_batch) * self.config.parallel.world_size + rank
        return (self.config.seed << 32) + index  # both are below 2**32

    def last_loss(self) -> float:
        """Returns this rank's loss of the newest optimizer step; waits for the device."""
        end = self._num_micro_batches
        return float(self._losses[end - self.config.accumulate : end].mean())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        score = self.objective.score(batch)
        before = self._score
        self._score = score if before is None else Score(*map(torch.add, before, score))

    def on_validation_epoch_end(self) -> None:
        if isinstance(self.objective, FSDPModule):
            self.objective.reshard()  # without a backward pass the outermost weights stay gathered
        if self._score is None:
            return
        sums = torch.stack([part.double() for part in self._score])
        loss, correct, count = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self._score = None
        metrics = {"val_loss": loss / count, "val_accuracy": correct / count}
        self.validation.append({"step": self.trainer.global_step, **metrics})
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    def losses(self) -> Tensor:
        """Returns this rank's mean loss of every optimizer step of this segment."""
        steps, accumulate = self._num_steps, self.config.accumulate
        return self._losses[: steps * accumulate].view(steps, accumulate).mean(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A fused step would divide by float16's loss scale only after clipping.
        is_fused = self.config.parallel.precision != "16-mixed"
        return build_optimizer(self.network.named_parameters(), self.config, fused=is_fused)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        # Lightning's clipping rejects FSDP1, and fused optimizers even in bf16-mixed, which has no
        # loss scale. DeepSpeed clips inside its step.
        if gradient_clip_val is None or self.config.parallel.uses_deepspeed:
            return
        model = self.trainer.strategy.model
        assert model is not None
        self._gradient_norms[self._num_steps - 1] = clip_gradients(model, gradient_clip_val)
