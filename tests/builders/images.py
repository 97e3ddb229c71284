"""Image files of every depth, written byte by byte where PIL cannot write them."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[Any]

# A gradient from black to white: 8 rows, 10 columns, so that a turned image is noticed.
SHADES = np.linspace(0, 1, 80).reshape(8, 10)


def shades(dtype: str, white: float | None = None) -> Pixels:
    """The gradient as numbers of a type, white as its largest value if `white` is None."""
    if dtype[-2] == "f":
        return (SHADES * (white or 1)).astype(dtype)
    return np.rint(SHADES * (white or np.iinfo(dtype).max)).astype(dtype)


def png_bytes(values: Pixels, *, bits: int = 0, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG of gray (H x W), gray and alpha, RGB or RGBA values (H x W x channels)."""
    bits = bits or values.dtype.itemsize * 8
    channels = values.shape[2] if values.ndim == 3 else 1
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, color, 0, 0, 0)
    if bits < 8:
        rows = [_pack(row, bits) for row in values]
    else:
        rows = [row.astype(f">u{bits // 8}").tobytes() for row in values]
    chunks = [(b"IHDR", header)]
    if transparent:
        chunks.append((b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def tiff_bytes(values: Pixels, *, photometric: int = 1, bits: int = 0, order: str = "<") -> bytes:
    """A TIFF of one strip, with the sample format of the type of `values`.

    Args:
        photometric: 0: zero is white; 1: zero is black; 2: RGB; 5: CMYK; 8: L*a*b*.
        order: of bytes; "<" little, ">" big.
    """
    height, width, *rest = values.shape
    channels = rest[0] if rest else 1
    bits = bits or values.dtype.itemsize * 8
    if bits == 12:
        strip = b"".join(_pack(row, bits) for row in values)
    else:
        strip = values.astype(values.dtype.newbyteorder(order)).tobytes()  # type: ignore[arg-type]
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    # One number per channel: in the directory, or behind it if there are more than two.
    behind = b"" if channels == 1 else struct.pack(f"{order}8H", *[bits] * 4, *[sample_format] * 4)
    num_tags = 10
    start = 8 + 2 + 12 * num_tags + 4
    tags = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, channels, start if behind else _short(bits, order)),
        259: (4, 1, 1),
        262: (4, 1, photometric),
        273: (4, 1, start + len(behind)),
        277: (4, 1, channels),
        278: (4, 1, height),
        279: (4, 1, len(strip)),
        339: (3, channels, start + 8 if behind else _short(sample_format, order)),
    }
    assert len(tags) == num_tags
    entries = b"".join(struct.pack(f"{order}HHII", tag, *entry) for tag, entry in tags.items())
    mark = b"II*\0" if order == "<" else b"MM\0*"
    header = mark + struct.pack(f"{order}IH", 8, num_tags)
    return header + entries + b"\0\0\0\0" + behind + strip


def _short(value: int, order: str) -> int:
    """A number of 16 bits, which lies in the first half of a field of 32."""
    return value if order == "<" else value << 16


def _pack(row: Pixels, bits: int) -> bytes:
    """The values of a row in `bits` bits each, the highest first, up to a whole byte."""
    text = "".join(f"{value:0{bits}b}" for value in row.tolist())
    return bytes(int(text[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(text), 8))


def write_class_folders(root: Path, *classes: str, count: int = 4) -> Path:
    """Writes one folder of small RGB images per class; no two images are the same."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((20 + number, 30, 3), 40 * label + number, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root
