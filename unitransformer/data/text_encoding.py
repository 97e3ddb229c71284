"""Finds what is wrong with the encoding of a text, and suggests the likely one.

The head of a file is its first `HEAD_BYTES`.
"""

import codecs
import re
import unicodedata
from collections.abc import Iterable
from itertools import chain

HEAD_BYTES = 8192
# Byte order marks; that of UTF-32 starts with that of UTF-16.
MARKS = {
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-8": codecs.BOM_UTF8,
    "gb18030": b"\x84\x31\x95\x33",
}
# gzip, Unix compress, zstd, xz, bzip2, 7z, lz4, rar, and zip, in which other formats are packed.
_COMPRESSED = re.compile(
    rb"\x1f[\x8b\x9d]|\x28\xb5\x2f\xfd|\xfd7zXZ\0|BZh[1-9][1\x17]|7z\xbc\xaf|\x04\x22\x4d\x18"
    rb"|Rar!\x1a\x07|PK[\x03\x05]"
)
# Formats that may look like text: Parquet, Arrow, PDF, SQLite, NumPy, pickle, PNG and JPEG.
_BINARY = re.compile(
    rb"PAR1[\0-\x1f]|ARROW1\0|%PDF-|SQLite format 3\0|\x93NUMPY|\x80[\x02-\x05]|\x89PNG"
    rb"|\xff\xd8\xff"
)
_CONTROL_BYTES = re.compile(rb"[\0-\x08\x0e-\x19\x1c-\x1f]")
# Characters that no text has: NUL, half a surrogate pair, a byte order mark or a line feed read in
# the wrong byte order; and the escape sequence with which ISO 2022 selects an alphabet.
_NEVER_TEXT = re.compile("[\0\ud800-\udfff\ufffe\u0a00]")
_ISO_2022 = re.compile("\x1b\\$[()@AB]")
# Any bytes can be decoded in a code page, but a wrong one often gives control characters.
_NEVER_IN_CODE_PAGES = re.compile("[\0-\x08\x0e-\x19\x1b-\x1f\x7f-\x9f\ud800-\udfff\ufffe]")
# Bytes that are hardly right in UTF-8 by chance: characters of several bytes, in all of a block or
# one after the other; and words of 8-bit text.
_WIDE_UTF8 = rb"(?:[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})"
_UTF8 = re.compile(
    rb"\A(?:[\0-\x7f]*+%b){6,}+[\0-\x7f]*+\Z|(?:%b[\0-\x7f]*+){16}" % (_WIDE_UTF8, _WIDE_UTF8)
)
_8_BIT_WORDS = re.compile(rb"(?:[^\0 ]{1,15} ){12}")
# Guesses. Left alone, the detector prefers rare code pages.
_COMMON = (
    *("cp1252", "latin_1", "cp1251", "cp932", "shift_jis", "gb18030", "big5", "euc_kr", "euc_jp"),
    *("cp1253", "iso8859_7", "koi8_r"),
)
_RARE = ("cp1250", "iso8859_2", "iso8859_5", "cp1254", "cp1255", "cp1256", "cp866", "mac_roman")
_SEPARATORS = " \n\u3000\u3001\u3002\uff0c"  # spaces, and the common East Asian punctuation


def resolve_encoding(encoding: str, head: bytes) -> tuple[str, int]:
    """Returns the encoding with its byte order, and the length of the byte order mark to drop.

    A mark of another encoding is left to `find_fault`.
    """
    encoding, marked = encoding.removesuffix("-sig"), _marked(head)
    if marked and marked.startswith(encoding):
        return marked, len(MARKS[marked])
    return encoding, 0


def passed_over_kind(suffix: str, head: bytes, encoding: str) -> str | None:
    """Returns "compressed" or "binary" for a file that holds no text, or else None."""
    if _COMPRESSED.match(head):
        return "compressed" if suffix == ".zip" or not head.startswith(b"PK") else "binary"
    if _BINARY.match(head):
        return "binary"
    # A text may hold a few control characters: whether they are right is for `find_fault`.
    if len(_CONTROL_BYTES.findall(head)) * 50 <= len(head) or _wide_encoding(head):
        return None
    names = (resolve_encoding(e, head) for e in (encoding, _marked(head) or encoding))
    is_text = any(not find_fault([head[n:]], name, n, is_whole=False) for name, n in names)
    return None if is_text else "binary"


def find_fault(
    blocks: Iterable[bytes], encoding: str, start: int = 0, *, is_whole: bool = True
) -> tuple[int, str] | None:
    """Returns the first byte at which a file is not text in `encoding`, and why.

    `blocks` begin at byte `start`, behind the byte order mark. If they are not the whole file, they
    may end within a character. `encoding` is what `resolve_encoding` returns.
    """
    is_wide = encoding.startswith(("utf-16", "utf-32"))
    pattern = _NEVER_TEXT if encoding.startswith("utf-") else _NEVER_IN_CODE_PAGES
    decoder = codecs.getincrementaldecoder(encoding)()
    position = start
    for block in chain(blocks, [b""] * is_whole):
        if position == 0 and (marked := _marked(block)):
            return 0, f"byte order mark of {marked}"
        if position == 0 and encoding in ("utf-16", "utf-32"):
            return 0, "no byte order mark"
        first = position - len(decoder.getstate()[0])
        position += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = position - len(error.object) + error.start
            return offset, f"byte 0x{error.object[error.start]:02x} ({error.reason})"
        if found := pattern.search(text) or _ISO_2022.search(text):
            offset = first + len(text[: found.start()].encode(encoding, "replace"))
            return offset, f"character U+{ord(found[0][0]):04X}"
        if encoding != "utf-8" and (known := _UTF8.search(block)):
            return position - len(block) + known.start(), "utf-8 text"
        if is_wide and (known := _8_BIT_WORDS.search(block)):
            return position - len(block) + known.start(), "8-bit text"
    return None


def likely_encodings(sample: bytes, encoding: str) -> tuple[str, ...]:
    """Returns what a part of a text may be instead of `encoding`; all give the same text.

    Nothing, if `encoding` is UTF-8 and few bytes are wrong.
    """
    if wide := _marked(sample) or _wide_encoding(sample):
        return (wide,)
    text = sample.decode("utf-8", "replace")
    num_wrong = text.count("\ufffd")
    if len(text.encode()) - len(text) - 2 * num_wrong >= 4 * num_wrong:
        return () if encoding == "utf-8" else ("utf-8",)
    import charset_normalizer

    telling = b"\n".join(line for line in sample.split(b"\n") if not line.isascii())
    guesses, ranks = [*_COMMON, *_RARE], []
    for match in charset_normalizer.from_bytes(telling, cp_isolation=guesses, threshold=0.4):
        same = {match.encoding, *match.could_be_from_charset}
        names = [n for n in _COMMON if n in same] or [n for n in _RARE if n in same]
        oddness = round(match.chaos - match.coherence + 0.1 * (names[0] in _RARE), 1)
        ranks.append((oddness, guesses.index(names[0]), names[:2]))
    return tuple(name.replace("_", "-") for name in min(ranks)[-1]) if ranks else ()


def _marked(head: bytes) -> str | None:
    return next((name for name, mark in MARKS.items() if head.startswith(mark)), None)


def _wide_encoding(head: bytes) -> str | None:
    """Returns the encoding of UTF-16 or UTF-32 without a byte order mark."""
    num_zeros = head.count(0)
    if (
        head.isascii()
        and 3 * num_zeros < len(head)
        and len(_CONTROL_BYTES.findall(head)) == num_zeros
    ):
        return None  # ASCII with some zero bytes; that of UTF-16 has every other one
    for name in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        try:
            text = codecs.getincrementaldecoder(name)().decode(head[:HEAD_BYTES])
        except UnicodeDecodeError:
            continue
        num_unlikely = sum(unicodedata.category(c) in ("Cc", "Cn", "Co") for c in text)
        num_unlikely -= sum(map(text.count, "\t\n\r\f\v"))
        if text and num_unlikely * 100 <= len(text) <= 50 * sum(map(text.count, _SEPARATORS)):
            return name
    return None
