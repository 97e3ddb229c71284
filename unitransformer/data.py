"""Where batches come from: built-in, a path, or synthetic; the same global batch on any devices.

Sample `i` of pass `epoch` is a pure function of seed, epoch and `i`; which samples make up
optimizer step `s` is a pure function of seed and `s`. Ranks only divide them.

B batch | T positions | K masked positions | S pixels along a side | C channels
"""

import functools
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler

from unitransformer.config import RunConfig
from unitransformer.corpus import Corpus, load_corpus, special_tokens
from unitransformer.objectives import IGNORED, Batch

Picks = tuple[NDArray[np.int64], NDArray[np.int64]]  # epoch and index of each sample of a batch
VALIDATION_EPOCH = -1  # validation masks and pictures never change


class Samples(Protocol):
    """A finite set of samples, handed out by the batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, picks: Picks) -> Batch: ...


# ---------------------------------------------------------------------------------- order


def permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of pass `epoch`: every sample once."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


class TrainOrder(Sampler[Picks]):
    """The micro-batches of one rank from optimizer step `start_step` to the last.

    The stream of samples is one: pass after pass over the data, each in its own order, cut into
    global batches. A global batch holds the same samples however many ranks share it.
    """

    def __init__(
        self, config: RunConfig, num_samples: int, *, rank: int, start_step: int = 0
    ) -> None:
        self.config = config
        self.num_samples = num_samples
        self.rank = rank
        self.start_step = start_step

    def __len__(self) -> int:
        """Micro-batches of the whole run: Lightning counts a resumed one from where it stopped."""
        return self.config.max_steps * self.config.accumulate

    def __iter__(self) -> Iterator[Picks]:
        config = self.config
        world, size = config.parallel.world_size, config.batch_size
        order_of = functools.lru_cache(maxsize=2)(
            lambda epoch: permutation(self.num_samples, config.seed, epoch)
        )
        for step in range(self.start_step, config.max_steps):
            for part in range(config.accumulate):
                first = step * config.global_batch_size + (part * world + self.rank) * size
                epochs, places = np.divmod(np.arange(first, first + size), self.num_samples)
                pairs = zip(epochs.tolist(), places.tolist(), strict=True)
                yield epochs, np.array([order_of(epoch)[place] for epoch, place in pairs])


class ValidationOrder(Sampler[Picks]):
    """The first `validation_batches` batches of the validation samples, dealt out to the ranks."""

    def __init__(self, config: RunConfig, num_samples: int, *, rank: int) -> None:
        world = config.parallel.world_size
        if num_samples < world:
            raise ValueError(
                f"data {config.data.source} has {num_samples} validation samples for {world} "
                "devices; use more data or fewer devices"
            )
        self.size = min(config.batch_size, num_samples // world)
        self.num_batches = min(config.validation_batches, num_samples // (self.size * world))
        self.world, self.rank = world, rank

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Picks]:
        for batch in range(self.num_batches):
            first = (batch * self.world + self.rank) * self.size
            indices = np.arange(first, first + self.size)
            yield np.full_like(indices, VALIDATION_EPOCH), indices


# ---------------------------------------------------------------------------------- text


class NextWords:
    """GPT: stretches of T + 1 words; each word is predicted from those before it."""

    def __init__(self, words: NDArray[Any], length: int) -> None:
        self.words, self.length = words, length

    def __len__(self) -> int:
        return (len(self.words) - 1) // self.length

    def __getitem__(self, picks: Picks) -> Batch:
        _, indices = picks
        rows = _rows(self.words, indices * self.length, self.length + 1)
        return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}


class MaskedWords:
    """BERT: [CLS], T - 2 words, [SEP]; a fixed share of the words has to be found.

    Of the chosen positions 80 % show [MASK], 10 % a random word, 10 % the word itself (Devlin et
    al. 2019, section 3.1). Their number is the same in every sample, so shapes never change.
    """

    def __init__(self, config: RunConfig, words: NDArray[Any], num_words: int) -> None:
        self.words, self.num_words = words, num_words
        self.length = config.sequence_length
        self.num_masked = max(1, round(config.data.mask_fraction * self.length))
        self.seed = config.seed
        names = special_tokens("wordpiece")
        self.num_special = len(names)
        self.cls, self.sep, self.mask = (names.index(n) for n in ("[CLS]", "[SEP]", "[MASK]"))

    def __len__(self) -> int:
        return len(self.words) // (self.length - 2)

    def __getitem__(self, picks: Picks) -> Batch:
        epochs, indices = picks
        body = _rows(self.words, indices * (self.length - 2), self.length - 2)
        ends = body.new_ones(len(body), 1)
        inputs = torch.cat([ends * self.cls, body, ends * self.sep], dim=1)
        is_special = (inputs < self.num_special).numpy()
        # Three independent draws a position: which are chosen, what they show, which random word.
        chance = uniform(self.seed, epochs, indices, 3 * self.length).reshape(-1, 3, self.length)
        rank_of = np.where(is_special, 2.0, chance[:, 0]).argsort(axis=1, kind="stable")
        positions = torch.from_numpy(np.sort(rank_of[:, : self.num_masked], axis=1))
        targets = inputs.gather(1, positions)
        fate = torch.from_numpy(chance[:, 1]).gather(1, positions)
        draw = torch.from_numpy(chance[:, 2]).gather(1, positions)
        span = self.num_words - self.num_special
        random_word = (draw * span).long() + self.num_special
        shown = torch.where(fate < 0.8, self.mask, torch.where(fate < 0.9, random_word, targets))
        # A stretch of separators may hold too few words: special positions are no questions.
        is_word = targets >= self.num_special
        inputs = inputs.scatter(1, positions, torch.where(is_word, shown, targets))
        targets = torch.where(is_word, targets, IGNORED)
        return {"inputs": inputs, "targets": targets, "positions": positions}


def _rows(words: NDArray[Any], starts: NDArray[np.int64], length: int) -> Tensor:
    rows = words[starts[:, None] + np.arange(length)]
    return torch.from_numpy(rows.astype(np.int64))


def uniform(
    seed: int, epochs: NDArray[np.int64], indices: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Numbers in [0, 1), (B, count): a function of seed, epoch and sample index alone.

    A counter goes through the SplitMix64 finaliser (Steele, Lea, Flood 2014), so a batch needs no
    generator per sample.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.full(len(indices), seed, dtype=np.uint64))
        state = _mix(state ^ epochs.astype(np.uint64))
        state = _mix(state ^ indices.astype(np.uint64))
        lanes = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = _mix(state[:, None] + lanes)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------------------------- pictures


class Digits:
    """scikit-learn's 8 x 8 digits below `num_classes`, enlarged to the model's pictures."""

    def __init__(self, pictures: Tensor, labels: Tensor, image_size: int, channels: int) -> None:
        self.pictures, self.labels = pictures, labels
        self.image_size, self.channels = image_size, channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, picks: Picks) -> Batch:
        _, indices = picks
        small = self.pictures[indices].unsqueeze(1)
        large = functional.interpolate(small, size=(self.image_size,) * 2, mode="bilinear")
        return {
            "inputs": large.expand(-1, self.channels, -1, -1),
            "targets": self.labels[indices],
        }


UNREADABLE = (OSError, SyntaxError, ValueError)  # what PIL raises for a damaged file


class Folder:
    """Pictures of a folder with one folder a class, as `torchvision.datasets.ImageFolder` reads.

    A file that opens but does not decode is replaced by the next of its split that does, and
    named in a warning.
    """

    def __init__(self, files: list[tuple[str, int]], image_size: int, channels: int) -> None:
        from torchvision.transforms import v2

        self.files, self.channels = files, channels
        self.prepare = v2.Compose(
            [
                v2.Resize(image_size, antialias=True),
                v2.CenterCrop(image_size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * channels, [0.5] * channels),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, picks: Picks) -> Batch:
        samples = [self._load(int(index)) for index in picks[1]]
        inputs = torch.stack([picture for picture, _ in samples])
        return {"inputs": inputs, "targets": torch.tensor([label for _, label in samples])}

    def _load(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        for offset in range(len(self.files)):
            path, label = self.files[(index + offset) % len(self.files)]
            try:
                with Image.open(path) as picture:
                    pixels = picture.convert("RGB" if self.channels == 3 else "L")
            except UNREADABLE as error:
                warnings.warn(f"broken picture {path} skipped: {error}", stacklevel=2)
                continue
            prepared: Tensor = self.prepare(pixels)
            return prepared, label
        raise ValueError(f"none of {len(self.files)} pictures can be read, {path} among them")


# ---------------------------------------------------------------------------------- synthetic


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
        """Random samples on `device`, seeded by the run's seed and the first sample's index."""
        config, size = self.config, len(batch["inputs"])
        first = int(batch["inputs"][0]) if size else 0
        generator = torch.Generator(device).manual_seed(config.seed * 2**32 + first)
        model = config.model
        if model.image_size is not None:
            shape = (size, model.num_channels, model.image_size, model.image_size)
            pictures = torch.randn(shape, generator=generator, device=device)
            labels = torch.randint(model.num_classes, (size,), generator=generator, device=device)
            return {"inputs": pictures, "targets": labels}
        length = config.sequence_length
        words = torch.randint(
            model.num_classes, (size, length + 1), generator=generator, device=device
        )
        if config.recipe == "gpt":
            return {"inputs": words[:, :-1], "targets": words[:, 1:]}
        count = max(1, round(config.data.mask_fraction * length))
        chance = torch.rand((size, length), generator=generator, device=device)
        positions = chance.argsort(dim=1)[:, :count]
        inputs = words[:, :-1]
        return {"inputs": inputs, "targets": inputs.gather(1, positions), "positions": positions}


def pick(samples: Samples, indices: Sequence[int], device: torch.device) -> Batch:
    """Some samples as they look in validation, on `device`."""
    chosen = np.array(list(indices), dtype=np.int64)
    batch = samples[np.full_like(chosen, VALIDATION_EPOCH), chosen]
    return {key: value.to(device) for key, value in batch.items()}  # type: ignore[return-value,attr-defined]


# ---------------------------------------------------------------------------------- baseline


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What knowing nothing but frequencies reaches on the validation samples."""

    name: str
    loss: float | None = None  # nats
    accuracy: float | None = None


def unigram_baseline(train: NDArray[Any], validation: NDArray[Any], num_words: int) -> Baseline:
    """Cross entropy of the training words' frequencies (plus one) on the validation words."""
    counts = np.bincount(train, minlength=num_words) + 1.0
    nats = -np.log(counts / counts.sum())
    return Baseline(name="unigram entropy", loss=float(nats[validation].mean()))


def most_frequent_baseline(samples: Samples, order: ValidationOrder, answer: int) -> Baseline:
    """Accuracy of giving `answer` to every question of the validation samples."""
    targets = torch.cat([samples[picks]["targets"].reshape(-1) for picks in order])
    asked = targets[targets != IGNORED]
    return Baseline(name=f"always {answer}", accuracy=float((asked == answer).float().mean()))


# ---------------------------------------------------------------------------------- the module


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
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert config.model.image_size is not None
    classes = min(10, config.model.num_classes)
    keep = bunch.target < classes
    pixels, labels = bunch.images[keep], bunch.target[keep]
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

    root = Path(config.data.source)
    if not root.is_dir():
        raise ValueError(f"data {root} is not a folder of pictures; check the path")
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
    files, broken = _readable(folder.samples)
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


def _readable(samples: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[str]]:
    """The files that look sound without decoding them, and the paths of the others."""
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    def is_sound(sample: tuple[str, int]) -> bool:
        try:
            with Image.open(sample[0]) as picture:
                picture.verify()
        except UNREADABLE:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        sound = list(pool.map(is_sound, samples))
    pairs = list(zip(samples, sound, strict=True))
    return [sample for sample, ok in pairs if ok], [sample[0] for sample, ok in pairs if not ok]


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
        order = ValidationOrder(config, len(source.validation), rank=0)
        if source.corpus is not None and config.recipe == "gpt":
            seen = order.num_batches * order.size * order.world * config.sequence_length
            return unigram_baseline(
                source.corpus.train, source.corpus.validation[: seen + 1], config.model.num_classes
            )
        if source.corpus is not None:
            counts = np.bincount(source.corpus.train)
            counts[: len(special_tokens("wordpiece"))] = 0
            answer = int(counts.argmax())
            word = source.corpus.tokenizer.id_to_token(answer)
            found = most_frequent_baseline(source.validation, order, answer)
            return Baseline(name=f"most frequent word {word!r}", accuracy=found.accuracy)
        labels = _labels(source.train)
        answer = int(torch.bincount(labels).argmax())
        found = most_frequent_baseline(source.validation, order, answer)
        return Baseline(
            name=f"majority class {source.class_names[answer]}", accuracy=found.accuracy
        )

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
            pin_memory=torch.cuda.is_available(),
        )


def _labels(samples: Samples) -> Tensor:
    if isinstance(samples, Digits):
        return samples.labels
    assert isinstance(samples, Folder)
    return torch.tensor([label for _, label in samples.files])
