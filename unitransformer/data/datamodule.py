"""Builds a rank's data loaders from any source."""

import signal
from collections.abc import Sequence

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from unitransformer.config import RunConfig
from unitransformer.data.baselines import (
    Baseline,
    count_tokens,
    most_frequent_baseline,
    unigram_baseline,
    validation_targets,
)
from unitransformer.data.images import DigitImages, FolderImages
from unitransformer.data.sampler import VALIDATION_EPOCH, TrainSampler, ValidationSampler
from unitransformer.data.sources import BatchDataset, DataSource, Synthetic
from unitransformer.data.tokenizer import SPECIAL_TOKENS
from unitransformer.launch.signals import STOP_SIGNALS
from unitransformer.objectives import Batch


def validation_batch(dataset: BatchDataset, indices: Sequence[int], device: torch.device) -> Batch:
    """Returns samples as validation sees them, on `device`."""
    samples = np.array(list(indices), dtype=np.int64)
    batch = dataset[np.full_like(samples, VALIDATION_EPOCH), samples]
    return {key: value.to(device) for key, value in batch.items()}  # type: ignore[return-value,attr-defined]


class DataModule(pl.LightningDataModule):
    """Loaders of this rank; training data begins at optimizer step `start_step`."""

    def __init__(self, config: RunConfig, source: DataSource) -> None:
        super().__init__()
        self.config, self.source = config, source
        self.start_step = 0

    def train_dataloader(self) -> DataLoader[Batch]:
        if isinstance(self.source.train, Synthetic) and self.trainer is not None:
            self.source.train.draw(self.trainer.strategy.root_device)  # before the first step
        sampler = TrainSampler(
            self.config, len(self.source.train), rank=self._rank(), start_step=self.start_step
        )
        return self._loader(self.source.train, sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        sampler = ValidationSampler(self.config, len(self.source.validation), rank=self._rank())
        return self._loader(self.source.validation, sampler)

    def baseline(self) -> Baseline | None:
        """Returns the trivial baseline of the validation samples; None for synthetic data."""
        source, config = self.source, self.config
        if isinstance(source.train, Synthetic):
            return None
        targets = validation_targets(config, source.validation)
        if source.corpus is not None:
            counts = count_tokens(source.corpus.train, config.model.num_classes)
            if config.recipe == "gpt":
                return unigram_baseline(counts, targets)
            counts[: len(SPECIAL_TOKENS["wordpiece"])] = 0
            token_id = int(counts.argmax())
            name = f"most frequent token {source.corpus.tokenizer.id_to_token(token_id)!r}"
            return most_frequent_baseline(name, targets, token_id)
        assert isinstance(source.train, DigitImages | FolderImages)
        label = int(source.train.labels.bincount().argmax())
        name = f"majority class {source.class_names[label]}"
        return most_frequent_baseline(name, targets, label)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        if isinstance(self.source.train, Synthetic):
            return self.source.train.fill(batch, device)
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def _loader(
        self, dataset: BatchDataset, sampler: TrainSampler | ValidationSampler
    ) -> DataLoader[Batch]:
        num_workers = self.config.data.num_workers
        if num_workers is None:
            num_workers = 2 if isinstance(dataset, FolderImages) else 0
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            sampler=sampler,
            batch_size=None,  # the dataset returns whole micro-batches
            num_workers=num_workers,
            pin_memory=self.config.parallel.accelerator == "cuda",
            worker_init_fn=_ignore_signals,
        )


def _ignore_signals(_: int) -> None:
    """A batch system signals every process of a job; the rank decides when its loaders end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
