"""Objective, optimizer and trainer put together. The order of wrappers is written here, once."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.launch.signals import Stopped
from unitransformer.objectives import Batch, Objective, Score
from unitransformer.parallel import deepspeed
from unitransformer.parallel.activation_checkpointing import checkpoint_activations
from unitransformer.parallel.compile import compile_objective
from unitransformer.parallel.fsdp1 import plain_name
from unitransformer.parallel.strategies import clip_gradients, gather_network, shard
from unitransformer.training.optimizer import build_optimizer
from unitransformer.transformer import Transformer, Values
from unitransformer.weights import read_weights

WHOLE_BYTES = 2 * 2**30  # a divided network up to this is put together after training


class TrainingModule(pl.LightningModule):
    """Trains an `Objective`; keeps the loss of every micro-batch on the device."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        parallel = config.parallel
        with torch.device("meta"):
            network = Transformer(config.model)
        self.objective = Objective(network, loss_chunk=config.loss_chunk)
        # The order is: checkpoint, compile, shard. A graph sees what is computed again, and whole
        # weights.
        checkpoint_activations(self.objective, parallel.activation_checkpointing)
        compile_objective(self.objective, parallel.compile, by_layer=parallel.is_sharded)
        self._is_spread = not parallel.is_sharded
        self._first_values = self._find_first_values()
        if not parallel.is_sharded:
            self.objective.to_empty(device="cpu")
            network.initialise(self.first_values())
        self._losses = torch.zeros(0)  # of this launch, one a micro-batch
        self._gradient_norms = torch.zeros(0)  # of this launch, one an optimizer step
        self._num_micro_batches = 0
        self.first_step = 0  # optimizer steps done by earlier launches
        self.validation: list[dict[str, float]] = []  # of every launch
        self.stop_signal = 0  # that all ranks obey at the end of this step
        self._has_ended = False
        self._score: Score | None = None
        self._gathered: list[Transformer] = []  # no part of this module: one once trained, or none

    @property
    def network(self) -> Transformer:
        return self.objective.network

    def first_values(self) -> Values:
        """Weights before the first step: drawn from the seed, or read from a file."""
        return self._first_values

    def _find_first_values(self) -> Values:
        if self.config.init_from is not None:
            return read_weights(Path(self.config.init_from), self.config.model)
        return self.network.first_values(self.config.seed)

    def configure_model(self) -> None:
        if not self._is_spread:
            self._is_spread = True
            strategy = self.trainer.strategy
            shard(self.objective, self.config.parallel, strategy, self.first_values())

    def on_train_batch_end(self, *args: Any) -> None:
        if self.stop_signal:  # the callbacks have saved by now
            raise Stopped(self.stop_signal, step=self.trainer.global_step)

    def on_fit_end(self) -> None:
        if not self._has_ended:  # nothing was left to train: the last launch ended too early
            self.on_train_end()

    def on_train_end(self) -> None:
        # While everything is still in its place: Lightning takes it apart after this.
        self._has_ended = True
        last = self.validation[-1]["step"] if self.validation else 0
        if last != self.trainer.global_step:
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True
        if self.config.parallel.is_sharded and self._is_small:
            model = self.trainer.strategy.model
            assert model is not None
            self._gathered.append(gather_network(model, self.network, self.config.parallel))

    @property
    def whole_network(self) -> Transformer | None:
        """The network, after training with all its weights, on the first rank; None if it is
        divided and too large to be put together for figures alone."""
        if self.config.parallel.is_sharded:
            return self._gathered[0] if self._gathered else None
        return self.network

    @property
    def _is_small(self) -> bool:
        return 4 * count_parameters(self.config.model) <= WHOLE_BYTES

    def on_fit_start(self) -> None:
        # One tensor for all steps: a small one kept each step would split the freed logits it
        # lands in, and the next step's no longer fit there (seen: 30 MB a step on a CPU).
        steps = self.config.max_steps - self.first_step
        self._losses = torch.zeros(steps * self.config.accumulate, device=self.device)
        self._gradient_norms = torch.zeros(steps, device=self.device)
        self._num_micro_batches = 0
        parallel = self.config.parallel
        is_rounded = parallel.uses_deepspeed and parallel.precision != "32-true"
        if is_rounded and self.first_step == 0:  # a checkpoint has brought whole ones
            deepspeed.set_weights(self.network, self.first_values())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self._num_micro_batches % self.config.accumulate == 0:
            self._set_learning_rate(self.first_step + self._num_steps)
        if self.config.model.dropout:
            # Dropout is a function of seed, step and rank: a resumed step draws what it would have.
            torch.manual_seed(self.dropout_seed(self._num_micro_batches, rank=self.global_rank))
        loss: Tensor = self.objective(batch)
        self._losses[self._num_micro_batches] = loss.detach()
        self._num_micro_batches += 1
        return loss

    @property
    def _num_steps(self) -> int:
        """Optimizer steps of this launch whose micro-batches are all counted."""
        return self._num_micro_batches // self.config.accumulate

    def _set_learning_rate(self, step: int) -> None:
        # A function of the step: nothing has to be saved and restored.
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.config.optimizer.learning_rate_at(step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        is_step = self._num_micro_batches % self.config.accumulate == 0
        if is_step and self.config.parallel.uses_deepspeed and self.config.optimizer.clip_norm:
            engine: Any = self.trainer.strategy.model
            self._gradient_norms[self._num_steps - 1] = engine.get_global_grad_norm()

    def gradient_norms(self) -> Tensor:
        """Of every whole optimizer step of this launch, before clipping; empty without clipping."""
        return self._gradient_norms[: self._num_steps if self.config.optimizer.clip_norm else 0]

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
        if isinstance(self.objective, FSDPModule):
            self.objective.reshard()  # a forward pass alone leaves the outermost weights whole
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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A fused step would divide by float16's loss scale only after the clipping.
        is_fused = self.config.parallel.precision != "16-mixed"
        named = [(plain_name(name), p) for name, p in self.network.named_parameters()]
        return build_optimizer(named, self.config, fused=is_fused)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own refuses a fused optimizer in bf16-mixed, where nothing is scaled, and
        # FSDP1 altogether. DeepSpeed clips inside its step.
        if gradient_clip_val is None or self.config.parallel.uses_deepspeed:
            return
        model = self.trainer.strategy.model
        assert model is not None
        norm = clip_gradients(model, gradient_clip_val)
        self._gradient_norms[self._num_steps - 1] = norm
