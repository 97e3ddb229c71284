"""Samples of pictures: handwritten digits, or a folder with one folder a class."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from unitransformer.data.sampler import BatchIndices
from unitransformer.objectives import Batch

DECODED_AT_START = 10_000  # pictures; minutes more for a larger folder
# What PIL raises for a damaged file.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DigitImages:
    """Handwritten digits of 8 x 8 pixels below `num_classes`, enlarged to the model's pictures."""

    def __init__(self, images: Tensor, labels: Tensor, image_size: int, channels: int) -> None:
        self.images, self.labels = images, labels
        self.image_size, self.channels = image_size, channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, picks: BatchIndices) -> Batch:
        _, indices = picks
        small = self.images[indices].unsqueeze(1)
        # Repeated, not expanded: a tensor that overlaps itself cannot be pinned.
        large = functional.interpolate(small, size=(self.image_size,) * 2, mode="bilinear")
        return {
            "inputs": large.repeat(1, self.channels, 1, 1),
            "targets": self.labels[indices],
        }


class FolderImages:
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

    def __getitem__(self, picks: BatchIndices) -> Batch:
        samples = [self._load(int(index)) for index in picks[1]]
        inputs = torch.stack([picture for picture, _ in samples])
        return {"inputs": inputs, "targets": torch.tensor([label for _, label in samples])}

    def _load(self, index: int) -> tuple[Tensor, int]:
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


def split_readable(samples: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[str]]:
    """The sound files, and the paths of the others; of a large folder only headers are read."""
    is_small = len(samples) <= DECODED_AT_START

    def is_sound(sample: tuple[str, int]) -> bool:
        try:
            with Image.open(sample[0]) as picture:
                if is_small:
                    picture.load()
                else:
                    picture.verify()
        except UNREADABLE:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        sound = list(pool.map(is_sound, samples))
    pairs = list(zip(samples, sound, strict=True))
    return [sample for sample, ok in pairs if ok], [sample[0] for sample, ok in pairs if not ok]
