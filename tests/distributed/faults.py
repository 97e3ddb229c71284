"""Faults that tests inject into one rank of a run."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from unitransformer.training.module import TrainingModule


def inject(step: int, what: Callable[[], None]) -> Callable[[], None]:
    """Returns a fault: rank 1 calls `what` in its training step number `step`."""

    def fault() -> None:
        original = TrainingModule.training_step

        def training_step(self: TrainingModule, *arguments: object) -> torch.Tensor:
            if self.global_rank == 1 and self._num_micro_batches == step:
                place = Path(os.environ["UNITRANSFORMER_CACHE"]).with_name("fault-at")
                place.write_text(str(time.monotonic()))
                what()
            return original(self, *arguments)  # type: ignore[arg-type]

        TrainingModule.training_step = training_step  # type: ignore[method-assign,assignment]

    return fault


def raise_error() -> None:
    raise ArithmeticError("injected in rank 1")
