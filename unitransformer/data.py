"""Where batches come from: built-in, a path, or synthetic, behind one LightningDataModule."""

import hashlib
import math
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from unitransformer.config import RunConfig
from unitransformer.corpus import Corpus, load_corpus
from unitransformer.draws import uniform
from unitransformer.flops import count_looked_at
from unitransformer.objectives import IGNORED, Batch
from unitransformer.order import (
    VALIDATION_EPOCH,
    Picks,
    TrainOrder,
    ValidationOrder,
    permutation,
)
from unitransformer.pictures import Digits, Folder, split_readable
from unitransformer.stop_signals import SIGNALS
from unitransformer.tokenization import special_tokens
from unitransformer.words import MaskedWords, NextWords

COUNTED_AT_ONCE = 1 << 20  # words
# The 1,797 pictures that scikit-learn has: the test set of E. Alpaydin and C. Kaynak, Optical
# Recognition of Handwritten Digits, 1998, UCI Machine Learning Repository,
# https://doi.org/10.24432/C50P49, CC BY 4.0. `images` of 8 x 8 pixels from 0 to 16, `labels` from
# 0 to 9.
DIGITS = Path(__file__).with_name("digits.npz")


class Samples(Protocol):
    """A finite set of samples, handed out by the batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, picks: Picks) -> Batch: ...


class Synthetic:
    """Only says which samples: `fill` makes them on the device, where measuring wants them."""

    def __init__(self, config: RunConfig, num_samples: int) -> None:
        self.config, self.num_samples = config, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, picks: Picks) -> Batch:
        indices = torch.from_numpy(picks[1])
        return {"inputs": indices, "targets": indices}

    def fill(self, batch: Batch, device: torch.device) -> Batch:
        """Random samples on `device`, each a function of the run's seed and its own index."""
        config, indices = self.config, batch["inputs"].to(device, non_blocking=True)
        model, length = config.model, config.sequence_length
        if model.image_size is not None:
            shape = (model.num_channels, model.image_size, model.image_size)
            size = math.prod(shape)
            drawn = uniform(config.seed, 0, indices, size + 1)
            pictures = (drawn[:, :size] - 0.5) * math.sqrt(12)  # mean 0, variance 1
            labels = (drawn[:, size] * model.num_classes).long()
            return {"inputs": pictures.float().reshape(-1, *shape), "targets": labels}
        drawn = uniform(config.seed, 0, indices, 2 * length + 1)
        words = (drawn[:, : length + 1] * model.num_classes).long()
        if config.recipe == "gpt":
            return {"inputs": words[:, :-1], "targets": words[:, 1:]}
        positions = drawn[:, length + 1 :].argsort(dim=1)[:, : count_looked_at(config)]
        inputs = words[:, :-1]
        return {"inputs": inputs, "targets": inputs.gather(1, positions), "positions": positions}


def pick(samples: Samples, indices: Sequence[int], device: torch.device) -> Batch:
    """Some samples as they look in validation, on `device`."""
    chosen = np.array(list(indices), dtype=np.int64)
    batch = samples[np.full_like(chosen, VALIDATION_EPOCH), chosen]
    return {key: value.to(device) for key, value in batch.items()}  # type: ignore[return-value,attr-defined]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What knowing nothing but frequencies reaches on the validation samples."""

    name: str
    loss: float | None = None  # nats
    accuracy: float | None = None


def count_words(words: NDArray[Any], num_words: int) -> NDArray[np.int64]:
    """How often each word occurs; block by block, as the words may not fit in memory."""
    counts = np.zeros(num_words, dtype=np.int64)
    for start in range(0, len(words), COUNTED_AT_ONCE):
        counts += np.bincount(words[start : start + COUNTED_AT_ONCE], minlength=num_words)
    return counts


def unigram_baseline(train: NDArray[Any], validation: Tensor, num_words: int) -> Baseline:
    """Cross entropy of the training words' frequencies (plus one) on the words of validation."""
    counts = count_words(train, num_words) + 1.0
    nats = -np.log(counts / counts.sum())
    return Baseline(name="unigram entropy", loss=float(nats[validation.numpy()].mean()))


def most_frequent_baseline(name: str, validation: Tensor, answer: int) -> Baseline:
    """Accuracy of giving `answer` to every question of validation."""
    return Baseline(name=name, accuracy=float((validation == answer).float().mean()))


def asked_in_validation(config: RunConfig, samples: Samples) -> Tensor:
    """The right answers to what every rank together is asked in validation."""
    orders = [
        ValidationOrder(config, len(samples), rank=rank)
        for rank in range(config.parallel.world_size)
    ]
    targets = [samples[picks]["targets"].reshape(-1) for order in orders for picks in order]
    answers = torch.cat(targets)
    return answers[answers != IGNORED]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Samples of one kind, ready for any rank."""

    train: Samples
    validation: Samples
    description: str
    sha256: str | None = None
    class_names: tuple[str, ...] = ()
    corpus: Corpus | None = None


def load_source(config: RunConfig, *, show_progress: bool = False) -> Source:
    """Read, tokenise or list the data of `config`.

    Raises:
        ValueError: data that is missing, empty, too short or does not fit the model.
    """
    if config.data.source == "synthetic":
        samples = Synthetic(config, 1 << 20)
        return Source(train=samples, validation=samples, description="synthetic, on the device")
    if not config.model.reads_pictures:
        return _text_source(config, show_progress)
    if config.data.source == "builtin":
        return _digits_source(config)
    return _folder_source(config)


def _text_source(config: RunConfig, show_progress: bool) -> Source:
    kind = "bpe" if config.recipe == "gpt" else "wordpiece"
    corpus = load_corpus(
        config.data.source,
        kind=kind,  # type: ignore[arg-type]
        vocabulary_size=config.model.num_classes,
        show_progress=show_progress,
    )
    splits: list[Samples] = []
    for name, words in (("training", corpus.train), ("validation", corpus.validation)):
        samples: Samples
        if config.recipe == "gpt":
            samples = NextWords(words, config.sequence_length)
        else:
            samples = MaskedWords(config, words, corpus.tokenizer.get_vocab_size())
        if not len(samples):
            raise ValueError(
                f"data {config.data.source} has {len(words)} {name} tokens, less than one sequence "
                f"of {config.sequence_length}; give more text or a shorter data.sequence_length"
            )
        splits.append(samples)
    return Source(
        train=splits[0],
        validation=splits[1],
        description=corpus.description,
        sha256=corpus.sha256,
        corpus=corpus,
    )


def _digits_source(config: RunConfig) -> Source:
    with np.load(DIGITS) as stored:
        images, digits = stored["images"].astype(np.float64), stored["labels"].astype(np.int64)
    assert config.model.image_size is not None
    classes = min(10, config.model.num_classes)
    keep = digits < classes
    pixels, labels = images[keep], digits[keep]
    pictures = torch.from_numpy(pixels).float() / 8.0 - 1.0  # 0..16 -> -1..1
    targets = torch.from_numpy(labels).long()
    order = permutation(len(targets), 0, 0)  # the split is part of the data, not of the seed
    cut = len(targets) // 5
    parts = [
        Digits(pictures[part], targets[part], config.model.image_size, config.model.num_channels)
        for part in (order[cut:], order[:cut])
    ]
    return Source(
        train=parts[0],
        validation=parts[1],
        description=f"scikit-learn digits 0 to {classes - 1}, {len(targets)} pictures of 8 x 8",
        sha256=hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest(),
        class_names=tuple(map(str, range(classes))),
    )


def _folder_source(config: RunConfig) -> Source:
    from torchvision.datasets import ImageFolder

    root = Path(config.data.source).expanduser()
    if not root.is_dir():
        raise ValueError(f"data {root} is not a folder of pictures; check the path")
    if config.model.num_channels not in (1, 3):
        raise ValueError(
            f"model.num_channels is {config.model.num_channels}; pictures are read as grey (1) or "
            "RGB (3)"
        )
    try:
        folder = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise ValueError(
            f"data {root} does not hold one folder of pictures a class: {error}"
        ) from error
    model = config.model
    if len(folder.classes) > model.num_classes:
        raise ValueError(
            f"data {root} has {len(folder.classes)} classes and model.num_classes is "
            f"{model.num_classes}; set --model.num-classes {len(folder.classes)}"
        )
    files, broken = split_readable(folder.samples)
    if broken:
        names = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        warnings.warn(f"{len(broken)} broken pictures skipped: {names}", stacklevel=2)
    if len(files) < 2:
        raise ValueError(f"data {root} has {len(files)} readable pictures; at least 2 are needed")
    order = permutation(len(files), 0, 0)
    cut = max(1, len(files) // 10)
    assert model.image_size is not None
    train, validation = (
        Folder([files[i] for i in part], model.image_size, model.num_channels)
        for part in (order[cut:], order[:cut])
    )
    skipped = f", {len(broken)} broken skipped" if broken else ""
    return Source(
        train=train,
        validation=validation,
        description=f"{root.name}, {len(files)} pictures of {len(folder.classes)} classes{skipped}",
        class_names=tuple(folder.classes),
    )


class DataModule(pl.LightningDataModule):
    """Loaders for the rank that asks; `start_step` is where a resumed run goes on."""

    def __init__(self, config: RunConfig, source: Source) -> None:
        super().__init__()
        self.config, self.source = config, source
        self.start_step = 0

    def train_dataloader(self) -> DataLoader[Batch]:
        order = TrainOrder(
            self.config,
            len(self.source.train),
            rank=self._rank(),
            start_step=self.start_step,
        )
        return self._loader(self.source.train, order)

    def val_dataloader(self) -> DataLoader[Batch]:
        order = ValidationOrder(self.config, len(self.source.validation), rank=self._rank())
        return self._loader(self.source.validation, order)

    def baseline(self) -> Baseline | None:
        """What frequencies alone reach on the validation samples; None for synthetic data."""
        source, config = self.source, self.config
        if isinstance(source.train, Synthetic):
            return None
        asked = asked_in_validation(config, source.validation)
        if source.corpus is not None and config.recipe == "gpt":
            return unigram_baseline(source.corpus.train, asked, config.model.num_classes)
        if source.corpus is not None:
            counts = count_words(source.corpus.train, config.model.num_classes)
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

    def _loader(self, samples: Samples, order: Sampler[Picks]) -> DataLoader[Batch]:
        workers = self.config.data.num_workers
        if workers is None:
            workers = 2 if isinstance(samples, Folder) else 0
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
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _labels(samples: Samples) -> Tensor:
    if isinstance(samples, Digits):
        return samples.labels
    assert isinstance(samples, Folder)
    return torch.tensor([label for _, label in samples.files])
