"""Image samples: handwritten digits, or a folder with one subfolder per class."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from unitransformer.data.sampler import BatchIndices
from unitransformer.objectives import Batch

MAX_DECODED_AT_START = 10_000  # images; decoding more would take minutes
# What PIL raises for a damaged file.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DigitImages:
    """Handwritten digits of 8 x 8 pixels, enlarged to the model's image size."""

    def __init__(self, images: Tensor, labels: Tensor, image_size: int, channels: int) -> None:
        self.images, self.labels = images, labels
        self.image_size, self.channels = image_size, channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, batch: BatchIndices) -> Batch:
        _, indices = batch
        small = self.images[indices].unsqueeze(1)
        large = functional.interpolate(small, size=(self.image_size,) * 2, mode="bilinear")
        # Not `expand`: a tensor that overlaps itself cannot be pinned.
        return {"inputs": large.repeat(1, self.channels, 1, 1), "targets": self.labels[indices]}


class FolderImages:
    """Image files with labels, as `torchvision.datasets.ImageFolder` lists them.

    A file that cannot be decoded is named in a warning, and the next readable one of the same
    split takes its place.
    """

    def __init__(self, files: list[tuple[str, int]], image_size: int, channels: int) -> None:
        from torchvision.transforms import v2

        self.files, self.channels = files, channels
        self.labels = torch.tensor([label for _, label in files])
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

    def __getitem__(self, batch: BatchIndices) -> Batch:
        samples = [self._load(int(index)) for index in batch[1]]
        inputs = torch.stack([image for image, _ in samples])
        return {"inputs": inputs, "targets": torch.tensor([label for _, label in samples])}

    def _load(self, index: int) -> tuple[Tensor, int]:
        for offset in range(len(self.files)):
            path, label = self.files[(index + offset) % len(self.files)]
            try:
                with Image.open(path) as file:
                    pixels = file.convert("RGB" if self.channels == 3 else "L")
            except UNREADABLE as error:
                warnings.warn(f"broken image {path} skipped: {error}", stacklevel=2)
                continue
            return self.prepare(pixels), label
        raise ValueError(f"none of {len(self.files)} images can be read, {path} among them")


def split_readable(samples: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[str]]:
    """Returns the readable files and the paths of the others; many files: checks headers only."""
    decodes_all = len(samples) <= MAX_DECODED_AT_START

    def is_readable(sample: tuple[str, int]) -> bool:
        try:
            with Image.open(sample[0]) as image:
                (image.load if decodes_all else image.verify)()
        except UNREADABLE:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        pairs = list(zip(samples, pool.map(is_readable, samples), strict=True))
    return [sample for sample, ok in pairs if ok], [sample[0] for sample, ok in pairs if not ok]
