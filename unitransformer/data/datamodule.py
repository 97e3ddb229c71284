"""Where batches come from: built-in, a path, or synthetic, behind one LightningDataModule."""

import signal
from collections.abc import Sequence

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from unitransformer.config import RunConfig
from unitransformer.data.baselines import (
    Baseline,
    count_tokens,
    most_frequent_baseline,
    unigram_baseline,
    validation_targets,
)
from unitransformer.data.images import DigitImages, FolderImages
from unitransformer.data.sampler import (
    VALIDATION_EPOCH,
    BatchIndices,
    TrainSampler,
    ValidationSampler,
)
from unitransformer.data.sources import BatchDataset, DataSource
from unitransformer.data.synthetic import Synthetic
from unitransformer.data.tokenizer import special_tokens
from unitransformer.launch.signals import STOP_SIGNALS
from unitransformer.objectives import Batch


def validation_batch(samples: BatchDataset, indices: Sequence[int], device: torch.device) -> Batch:
    """Some samples as they look in validation, on `device`."""
    chosen = np.array(list(indices), dtype=np.int64)
    batch = samples[np.full_like(chosen, VALIDATION_EPOCH), chosen]
    return {key: value.to(device) for key, value in batch.items()}  # type: ignore[return-value,attr-defined]


class DataModule(pl.LightningDataModule):
    """Loaders for the rank that asks; `start_step` is where a resumed run goes on."""

    def __init__(self, config: RunConfig, source: DataSource) -> None:
        super().__init__()
        self.config, self.source = config, source
        self.start_step = 0

    def train_dataloader(self) -> DataLoader[Batch]:
        order = TrainSampler(
            self.config,
            len(self.source.train),
            rank=self._rank(),
            start_step=self.start_step,
        )
        return self._loader(self.source.train, order)

    def val_dataloader(self) -> DataLoader[Batch]:
        order = ValidationSampler(self.config, len(self.source.validation), rank=self._rank())
        return self._loader(self.source.validation, order)

    def baseline(self) -> Baseline | None:
        """What frequencies alone reach on the validation samples; None for synthetic data."""
        source, config = self.source, self.config
        if isinstance(source.train, Synthetic):
            return None
        asked = validation_targets(config, source.validation)
        if source.corpus is not None and config.recipe == "gpt":
            return unigram_baseline(source.corpus.train, asked, config.model.num_classes)
        if source.corpus is not None:
            counts = count_tokens(source.corpus.train, config.model.num_classes)
            counts[: len(special_tokens("wordpiece"))] = 0
            answer = int(counts.argmax())
            word = source.corpus.tokenizer.id_to_token(answer)
            return most_frequent_baseline(f"most frequent word {word!r}", asked, answer)
        answer = int(torch.bincount(_labels(source.train)).argmax())
        name = f"majority class {source.class_names[answer]}"
        return most_frequent_baseline(name, asked, answer)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        if isinstance(self.source.train, Synthetic):
            return self.source.train.fill(batch, device)
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def _loader(self, samples: BatchDataset, order: Sampler[BatchIndices]) -> DataLoader[Batch]:
        workers = self.config.data.num_workers
        if workers is None:
            workers = 2 if isinstance(samples, FolderImages) else 0
        return DataLoader(
            samples,  # type: ignore[arg-type]
            sampler=order,
            batch_size=None,  # a pick is a whole micro-batch already
            num_workers=workers,
            pin_memory=self.config.parallel.accelerator == "cuda",
            worker_init_fn=_outlive_signals,
        )


def _outlive_signals(_: int) -> None:
    """Batch systems signal every process of a job: the rank decides when its loaders end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _labels(samples: BatchDataset) -> Tensor:
    if isinstance(samples, DigitImages):
        return samples.labels
    assert isinstance(samples, FolderImages)
    return torch.tensor([label for _, label in samples.files])
