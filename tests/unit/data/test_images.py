"""One rule per kind of image file: the same image gives the same pixels, or a refusal."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile

from tests.builders.images import png_bytes, shades, tiff_bytes
from unitransformer.data import images
from unitransformer.data.images import UnsupportedImageError, digest_readable, read_image

GRAY = shades("u1")
RGB = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=-1)
RGB_16 = RGB.astype(np.uint16) * 257
ALPHA_16 = np.full((8, 10, 1), 65535, dtype=np.uint16)
ZERO = np.zeros_like(GRAY)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content: bytes, folder: Path, channels: int = 3) -> NDArray[np.int64]:
    path = folder / "image"
    path.write_bytes(content)
    return np.asarray(read_image(str(path), channels)).astype(np.int64)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "content",
    [
        png_bytes(shades("u1")),
        png_bytes(shades("u2")),
        png_bytes(np.dstack([shades("u2"), ALPHA_16])),
        png_bytes(np.dstack([shades("u2")] * 3)),
        saved(Image.fromarray(shades("u2")), "PPM"),
        saved(Image.fromarray(shades("u2")), "JPEG2000"),
        saved(Image.fromarray(shades("u2")), "TIFF", compression="tiff_lzw"),
        tiff_bytes(shades("u2", 4095), bits=12),
        *(tiff_bytes(shades(dtype), order=order) for dtype in ("u2", "f4") for order in "<>"),
        tiff_bytes(65535 - shades("u2"), photometric=0),
        *(tiff_bytes(1 - shades("f4"), photometric=0, order=order) for order in "<>"),
        *(tiff_bytes(np.dstack([shades("u2")] * 3), photometric=2, order=order) for order in "<>"),
    ],
)
def test_the_same_gray_image_has_the_same_pixels_at_every_depth(
    content: bytes, channels: int, tmp_path: Path
) -> None:
    pixels = read(content, tmp_path, channels)
    expected = GRAY if channels == 1 else np.dstack([GRAY] * 3)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 1
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize(
    "content",
    [
        png_bytes(RGB),
        png_bytes(RGB_16),
        png_bytes(np.dstack([RGB_16, ALPHA_16])),
        *(tiff_bytes(RGB_16, photometric=2, order=order) for order in "<>"),
        saved(Image.fromarray(RGB), "WEBP", lossless=True),
        saved(Image.fromarray(RGB).convert("RGBA"), "TIFF"),
        # Cyan, magenta and yellow are what red, green and blue lack; here black adds nothing.
        saved(Image.fromarray(np.dstack([255 - RGB, ZERO]), "CMYK"), "TIFF"),
        *(
            tiff_bytes(np.dstack([65535 - RGB_16, 0 * ALPHA_16]), photometric=5, order=order)
            for order in "<>"
        ),
    ],
)
def test_the_same_color_image_has_the_same_pixels_in_every_format(
    content: bytes, tmp_path: Path
) -> None:
    assert np.abs(read(content, tmp_path) - RGB).max() <= 1


def test_integers_of_16_bits_are_rounded_to_the_nearest_level(tmp_path: Path) -> None:
    # 257 is level 1; 128 is below half of it, 129 above.
    values = np.array([[0, 128, 129, 257, 385, 386, 65535]], dtype=np.uint16)
    assert read(png_bytes(values), tmp_path, 1).tolist() == [[0, 0, 1, 1, 1, 2, 255]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff_bytes(shades("i4")), "mode I"),
        (tiff_bytes(shades("u4")), "mode I"),
        (tiff_bytes(shades("i2"), order=">"), "mode I"),
        (tiff_bytes(shades("f4", 255)), "mode F with values from 0 to 255"),
        (tiff_bytes(shades("f4", -1)), "mode F with values from -1 to -?0"),
        (tiff_bytes(shades("f4", np.nan)), "mode F with values from nan"),
    ],
)
def test_values_of_unknown_range_are_refused_with_the_file_and_its_mode(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedImageError, match=rf"image .*/image has {reason}.*; .*save it"):
        read(content, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        png_bytes(np.array([[0, 1], [2, 3]]), bits=2, transparent=(1,)),
        png_bytes(np.array([[0, 5], [10, 15]]), bits=4, transparent=(5,)),
        png_bytes(np.array([[0, 85], [170, 255]], dtype=np.uint8), transparent=(85,)),
        png_bytes(257 * np.array([[0, 85], [170, 255]], dtype=np.uint16), transparent=(85 * 257,)),
        png_bytes(
            np.dstack([257 * np.array([[0, 85], [170, 255]], dtype=np.uint16)] * 3),
            transparent=(85 * 257,) * 3,
        ),
        png_bytes(
            np.array([[[0, 255], [85, 0]], [[170, 255], [255, 255]]], dtype=np.uint8),
        ),
    ],
)
def test_transparent_pixels_become_white_at_every_depth(content: bytes, tmp_path: Path) -> None:
    assert read(content, tmp_path, 1).tolist() == [[0, 255], [170, 255]]
    assert read(content, tmp_path, 3)[..., 2].tolist() == [[0, 255], [170, 255]]


@pytest.mark.parametrize(("kind", "transparent"), [("PNG", 0), ("PNG", b"\0\xff"), ("GIF", 0)])
def test_a_transparent_color_of_a_palette_becomes_white(
    kind: str, transparent: int | bytes, tmp_path: Path
) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    pixels = read(saved(image, kind, transparency=transparent), tmp_path)
    assert pixels.tolist() == [[[255] * 3, [200, 100, 50]], [[200, 100, 50], [255] * 3]]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    content = saved(Image.new("RGBA", (1, 1), (0, 100, 255, 51)), "PNG")  # a fifth
    assert read(content, tmp_path).tolist() == [[[204, 224, 255]]]


def test_opaque_pixels_keep_their_values(tmp_path: Path) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    content = saved(Image.fromarray(colors).convert("RGBA"), "PNG")
    assert np.array_equal(read(content, tmp_path), colors)


def test_cmyk_is_inverted_only_in_files_with_the_mark_of_adobe(tmp_path: Path) -> None:
    ink = (200, 30, 60, 10)
    rgb = [round((255 - part) * (255 - ink[3]) / 255) for part in ink[:3]]
    adobe = saved(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)  # PIL writes the mark
    assert np.abs(read(adobe, tmp_path) - rgb).max() <= 2
    inverted = tuple(255 - part for part in ink)
    marked = saved(Image.new("CMYK", (16, 16), inverted), "JPEG", quality=100)
    start = marked.index(b"\xff\xee")
    (length,) = struct.unpack(">H", marked[start + 2 : start + 4])
    plain = marked[:start] + marked[start + 2 + length :]
    assert np.abs(read(plain, tmp_path) - rgb).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "16-bit PNG", "16-bit TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_orientation_says(
    kind: str, orientation: int, tmp_path: Path
) -> None:
    upright = np.zeros((16, 32), dtype=np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = 250, 150, 50
    # What a camera stores, by orientation (Exif 2.32, table 6).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    *depth, kind = kind.split()
    pixels = np.ascontiguousarray(stored)
    image = Image.fromarray(pixels.astype(np.uint16) * 257 if depth else pixels)
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(image, kind, exif=exif, **options)
    assert np.abs(read(content, tmp_path, 1) - upright).max() <= 3


def test_an_image_with_damaged_exif_data_stays_as_it_is_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    content = saved(Image.fromarray(RGB), "WEBP", lossless=True, exif=exif)
    damaged = content.replace(b"MM\0*", b"MM\0\0")
    assert damaged != content
    assert np.array_equal(read(damaged, tmp_path), RGB)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_of_a_file_is_used(kind: str, tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    content = saved(first, kind, save_all=True, append_images=[second])
    assert np.abs(read(content, tmp_path) - [255, 0, 0]).max() <= 2


def test_an_image_may_be_in_any_mode_that_has_a_white(tmp_path: Path) -> None:
    white = Image.new("RGB", (8, 8), "white")
    for mode in ("1", "L", "P", "RGBA", "CMYK", "YCbCr", "LAB"):
        pixels = read(saved(white.convert(mode), "TIFF"), tmp_path)
        assert pixels.min() >= 254, mode


def test_broken_files_are_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saved(Image.fromarray(RGB), "PNG")
    files = {"whole.png": whole, "cut.png": whole[:-40], "empty.png": b"", "text.png": b"text"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match=r"3 broken images skipped: .*cut\.png \(.*trunc.*\)"):
        digests = digest_readable([(str(tmp_path / name), 0) for name in files], 3)
    assert list(digests) == [str(tmp_path / "whole.png")]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 39)  # the image has 80 pixels; 78 are allowed
    with pytest.warns(UserWarning, match="1 broken images skipped: .*exceeds limit"):
        assert digest_readable([(str(tmp_path / "whole.png"), 0)], 3) == {}


def test_an_image_of_unknown_range_is_refused_before_training_also_among_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tif").write_bytes(tiff_bytes(shades("f4", 255)))
    (tmp_path / "b.png").write_bytes(saved(Image.fromarray(RGB), "PNG"))
    files = [(str(tmp_path / name), 0) for name in ("b.png", "a.tif")]
    for limit in (2, 1):
        monkeypatch.setattr(images, "MAX_DECODED_AT_START", limit)
        with pytest.raises(UnsupportedImageError, match=r"a\.tif has mode F"):
            digest_readable(files, 3)


def test_digests_follow_the_bytes_or_the_size_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ppm"

    def digest(level: int) -> str:
        path.write_bytes(saved(Image.new("RGB", (4, 4), (level,) * 3), "PPM"))
        return digest_readable([(str(path), 0)], 3)[str(path)]

    assert digest(1) == digest(1) != digest(2)
    monkeypatch.setattr(images, "MAX_DECODED_AT_START", 0)
    assert digest(1) == digest(2)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
