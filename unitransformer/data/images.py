"""Image samples: handwritten digits, or a folder with one subfolder per class."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor
from torch.nn import functional

from unitransformer.data.image_folder import ImageFile
from unitransformer.data.sampler import BatchIndices
from unitransformer.objectives import Batch

MAX_DECODED_AT_START = 10_000  # images; decoding more would take minutes
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


class UnsupportedImageError(ValueError):
    """An image is whole, but its values do not say what is black and what is white."""


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
                pixels = read_image(path, self.channels)
            except (MemoryError, UnsupportedImageError):
                raise
            except Exception as error:  # PIL raises many types for damaged files
                warnings.warn(f"broken image {path} skipped: {error}", stacklevel=2)
                continue
            return self.prepare(pixels), label
        raise ValueError(f"none of {len(self.files)} images can be read, {path} among them")


def read_image(path: str, channels: int) -> Image.Image:
    """Decodes the first frame of a file to 8-bit RGB, or to gray if `channels` is 1.

    Unsigned integers are scaled by the range of their type, floating-point numbers from 0 to 1.
    Transparent parts become white. The image is turned as its EXIF orientation says. CMYK and
    other color spaces are converted without the color profile of the file.

    Raises:
        UnsupportedImageError: other integers or numbers, or a mode that PIL does not convert.
        Exception: the file is damaged, cut off, or has more than PIL's limit of 179M pixels.
    """
    with Image.open(path) as image:
        # Pillow 11.3 to 13.0 map a named, uncompressed TIFF into memory as if it was stored turned.
        image.filename = ""
        color = image.info.get("transparency")
        if image.format == "PNG" and color is not None:
            # PIL scales the pixels to 8 bits, but not the color that stands for transparent.
            match image.tile[0][3]:
                case "L;2" | "L;4" as bits:
                    image.info["transparency"] = color * 255 // (2 ** int(bits[-1]) - 1)
                case "RGB;16B":
                    image.info["transparency"] = tuple(value >> 8 for value in color)
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF data: the pixels are whole
            ImageOps.exif_transpose(image, in_place=True)
        pixels = _scale_to_8_bits(image, path) if image.mode[0] in "IF" else image
        if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
            pixels = ImageChops.invert(image)  # PIL inverts every file, as those of Adobe need
    try:
        if pixels.has_transparency_data:
            white = Image.new("RGBA", pixels.size, "white")
            pixels = Image.alpha_composite(white, pixels.convert("RGBA"))
        elif pixels.mode == "LAB":
            pixels = pixels.convert("RGB")
        mode = "RGB" if channels == 3 else "L"
        return pixels if pixels.mode == mode else pixels.convert(mode)
    except ValueError as error:
        raise UnsupportedImageError(f"image {path}: {error}; save it as RGB or gray") from error


def _scale_to_8_bits(image: Image.Image, path: str) -> Image.Image:
    """Scales gray integers of 12 or 16 bits and floating-point numbers."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        levels = np.rint(values * 255.0)
        if not (levels.min() >= 0 and levels.max() <= 255):  # also if one is not a number
            raise UnsupportedImageError(
                f"image {path} has mode F with values from {values.min():g} to {values.max():g}; "
                "scale them to 0 to 1, or save it with 8 or 16 bits"
            )
    elif image.mode == "I" and image.format == "TIFF":
        raise UnsupportedImageError(
            f"image {path} has mode I, integers of 32 bits or with a sign, whose white is not "
            "known; save it with 8 bits, or 16 bits without a sign"
        )
    else:
        white = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
        levels = (values.astype(np.uint32) * 255 + white // 2) // white
        levels[values == image.info.get("transparency", -1)] = 255
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    return Image.fromarray(levels.astype(np.uint8))


def digest_readable(files: Sequence[ImageFile], channels: int) -> dict[str, str]:
    """Returns the SHA-256 of each file that can be read, by path; a warning names the others.

    Of more than MAX_DECODED_AT_START files, it reads only the headers and hashes the sizes.

    Raises:
        UnsupportedImageError: as `read_image`.
    """
    decodes_all = len(files) <= MAX_DECODED_AT_START
    broken: list[str] = []

    def digest(path: str) -> str | None:
        try:
            if not decodes_all:
                with Image.open(path) as image:
                    has_doubtful_values = image.mode in ("I", "F")
                    image.verify()
            if decodes_all or has_doubtful_values:
                read_image(path, channels)
            content = Path(path).read_bytes() if decodes_all else b"%d" % os.path.getsize(path)
            return hashlib.sha256(content).hexdigest()
        except (MemoryError, UnsupportedImageError):
            raise
        except Exception as error:  # PIL raises many types for damaged files
            broken.append(f"{path} ({error})")
            return None

    paths = [path for path, _ in files]
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(paths, pool.map(digest, paths), strict=True))
    if broken:
        names = ", ".join(sorted(broken)[:3]) + (", ..." if len(broken) > 3 else "")
        warnings.warn(f"{len(broken)} broken images skipped: {names}", stacklevel=2)
    return {path: value for path, value in digests.items() if value}
