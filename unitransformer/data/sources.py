"""Loads the samples that a config asks for: built-in, synthetic, or from a path."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_predicted_positions
from unitransformer.data.corpus import Corpus, load_corpus
from unitransformer.data.counter_rng import uniform
from unitransformer.data.image_folder import list_images
from unitransformer.data.images import DigitImages, FolderImages, digest_readable
from unitransformer.data.sampler import BatchIndices, permutation
from unitransformer.data.text import MaskedTokens, NextTokens
from unitransformer.data.tokenizer import TokenArray
from unitransformer.files import expand_home, printable
from unitransformer.objectives import Batch

# The 1,797 images of scikit-learn's digits: the test set of E. Alpaydin and C. Kaynak, Optical
# Recognition of Handwritten Digits, 1998, UCI Machine Learning Repository,
# https://doi.org/10.24432/C50P49, CC BY 4.0. `images`: 8 x 8 pixels from 0 to 16; `labels`: 0 to 9.
DIGITS = Path(__file__).with_name("digits.npz")

NUM_SYNTHETIC = 1 << 18  # samples; each needs one number, or one token and one position


class BatchDataset(Protocol):
    """A finite set of samples that returns whole micro-batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, batch: BatchIndices) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Training and validation samples, and what the record says about them."""

    train: BatchDataset
    validation: BatchDataset
    description: str
    sha256: str | None = None
    class_names: tuple[str, ...] = ()
    corpus: Corpus | None = None


class Synthetic:
    """Random samples. Returns only indices, from which `fill` makes samples on the device.

    Loading data therefore does not limit the speed. `draw` draws one long row of random numbers
    before training. Sample i is a window of it that begins at number i, so that a step only copies.
    All samples differ, but they overlap: a model can learn them, and its loss means nothing.
    """

    def __init__(self, config: RunConfig, num_samples: int) -> None:
        self.config, self.num_samples = config, num_samples
        self._windows: dict[torch.device, list[Tensor]] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_windows": {}}  # workers of a loader need indices alone

    def __getitem__(self, batch: BatchIndices) -> Batch:
        indices = torch.from_numpy(batch[1])
        return {"inputs": indices, "targets": indices}

    def fill(self, batch: Batch, device: torch.device) -> Batch:
        """Returns random samples on `device`, each a function of the run's seed and its index."""
        indices = batch["inputs"].to(device, non_blocking=True)
        parts = [windows[indices] for windows in self.draw(device)]
        if self.config.recipe != "bert":
            return {"inputs": parts[0], "targets": parts[1]}
        inputs, positions = parts
        return {"inputs": inputs, "targets": inputs.gather(1, positions), "positions": positions}

    def draw(self, device: torch.device) -> list[Tensor]:
        """Returns two parts of all samples, as views of the numbers that it draws only once.

        They are images and labels, tokens and the next tokens, or tokens and masked positions.
        """
        if device not in self._windows:
            self._windows[device] = self._draw(device)
        return self._windows[device]

    def _draw(self, device: torch.device) -> list[Tensor]:
        config, model, length = self.config, self.config.model, self.config.sequence_length
        shape: tuple[int, ...] = (length + 1,)
        if model.image_size is not None:
            shape = (model.num_channels, model.image_size, model.image_size)
        row, size = torch.zeros(1, dtype=torch.long, device=device), math.prod(shape)
        random = uniform(config.seed, 0, row, self.num_samples - 1 + size)[0]
        if model.image_size is not None:
            images = ((random - 0.5) * math.sqrt(12)).float()  # mean 0, variance 1
            labels = (uniform(config.seed, 1, row, self.num_samples)[0] * model.num_classes).long()
            return [images.unfold(0, size, 1).view(-1, *shape), labels]
        tokens = (random * model.num_classes).long()
        inputs = tokens[:-1].unfold(0, length, 1)
        if config.recipe == "gpt":
            return [inputs, tokens[1:].unfold(0, length, 1)]
        # The same order of all positions again and again: those of a window differ.
        order = uniform(config.seed, 1, row, length)[0].argsort()
        positions = order.repeat(len(tokens) // length + 1)
        return [inputs, positions.unfold(0, count_predicted_positions(config), 1)]


def load_source(config: RunConfig, *, show_progress: bool = False) -> DataSource:
    """Reads, tokenizes or lists the data of `config`.

    Raises:
        ValueError: the data is missing, empty, too short or does not fit the model.
    """
    if config.data.source == "synthetic":
        samples = Synthetic(config, NUM_SYNTHETIC)
        return DataSource(train=samples, validation=samples, description="synthetic, on the device")
    if not config.model.reads_images:
        return _text_source(config, show_progress)
    if config.data.source == "builtin":
        return _digits_source(config)
    return _folder_source(config)


def _text_source(config: RunConfig, show_progress: bool) -> DataSource:
    corpus = load_corpus(
        config.data.source,
        kind="bpe" if config.recipe == "gpt" else "wordpiece",
        vocab_size=config.model.num_classes,
        encoding=config.data.encoding,
        field=config.data.field,
        show_progress=show_progress,
    )

    def build(tokens: TokenArray, name: str) -> BatchDataset:
        dataset: BatchDataset
        if config.recipe == "gpt":
            dataset = NextTokens(tokens, config.sequence_length)
        else:
            dataset = MaskedTokens(config, tokens, corpus.tokenizer.get_vocab_size())
        if not len(dataset):
            raise ValueError(
                f"data {config.data.source} has {len(tokens)} {name} tokens, fewer than one "
                f"sequence of {config.sequence_length}; give more text or a shorter "
                "sequence-length"
            )
        return dataset

    return DataSource(
        train=build(corpus.train, "training"),
        validation=build(corpus.validation, "validation"),
        description=corpus.description,
        sha256=corpus.sha256,
        corpus=corpus,
    )


def _digits_source(config: RunConfig) -> DataSource:
    with np.load(DIGITS) as stored:
        images, digits = stored["images"].astype(np.float64), stored["labels"].astype(np.int64)
    assert config.model.image_size is not None
    classes = min(10, config.model.num_classes)
    is_used = digits < classes
    pixels, labels = images[is_used], digits[is_used]
    inputs = torch.from_numpy(pixels).float() / 8.0 - 1.0  # 0..16 -> -1..1
    targets = torch.from_numpy(labels).long()
    order = permutation(len(targets), 0, 0)  # the split does not depend on the run's seed
    cut = len(targets) // 5
    train, validation = (
        DigitImages(inputs[part], targets[part], config.model.image_size, config.model.num_channels)
        for part in (order[cut:], order[:cut])
    )
    return DataSource(
        train=train,
        validation=validation,
        description=f"scikit-learn digits 0 to {classes - 1}, {len(targets)} images of 8 x 8",
        sha256=hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest(),
        class_names=tuple(map(str, range(classes))),
    )


def _folder_source(config: RunConfig) -> DataSource:
    root = Path(expand_home(config.data.source))
    model = config.model
    if not root.is_dir():
        raise ValueError(f"data {root} is not a folder of images; check the path")
    if model.num_channels not in (1, 3):
        raise ValueError(
            f"model.num-channels is {model.num_channels}; images are read as gray (1) or RGB (3)"
        )
    assert model.image_size is not None
    folder = list_images(root)
    if len(folder.class_names) > model.num_classes:
        raise ValueError(
            f"data {root} has {len(folder.class_names)} classes and model.num-classes is "
            f"{model.num_classes}; set --model.num-classes {len(folder.class_names)}"
        )
    files = [*folder.train, *folder.validation]
    digests = digest_readable(files, model.num_channels)
    train, validation = (
        [file for file in part if file[0] in digests] for part in (folder.train, folder.validation)
    )
    if not folder.validation:
        order = permutation(len(train), 0, 0)
        cut = max(1, len(train) // 10)
        train, validation = ([train[i] for i in part] for part in (order[cut:], order[:cut]))
    parts = {"training": train, **({"validation": validation} if folder.validation else {})}
    for name, part in parts.items():
        if missing := set(range(len(folder.class_names))) - {label for _, label in part}:
            held_out = "" if folder.validation else " and is not held out for validation"
            raise ValueError(
                f"data {root} has no {name} image of class {folder.class_names[min(missing)]} that "
                f"can be read{held_out}; add images, or repair them and save them as 8-bit PNG"
            )
    digest = hashlib.sha256()
    for name, part in (("train", train), ("validation", validation)):
        for path, label in part:
            digest.update(f"{name} {folder.class_names[label]} {digests[path]}\n".encode())
    num_broken = len(files) - len(digests)
    facts = [
        printable(root.resolve().name),
        f"{len(digests):,} images of {len(folder.class_names):,} classes",
        *([f"{num_broken:,} broken skipped"] if num_broken else []),
        f"{len(validation):,} {'' if folder.validation else 'held out '}for validation",
        *folder.notes,
    ]
    return DataSource(
        train=FolderImages(train, model.image_size, model.num_channels),
        validation=FolderImages(validation, model.image_size, model.num_channels),
        description=", ".join(facts),
        sha256=digest.hexdigest(),
        class_names=folder.class_names,
    )
