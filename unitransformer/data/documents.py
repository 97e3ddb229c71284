"""Reads text files as documents, and divides them for training and validation.

A document is a plain text file, or one field of one line of a JSON Lines file.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BLOCK_BYTES = 1 << 20
MAX_LINE = 4 << 20  # characters; a longer line of plain text is cut
VALIDATION_EVERY = 20  # every 20th file, or the last 1/20 of the bytes if there are fewer files


class TextFile(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    path: Path
    start: int  # behind the byte order mark
    stop: int
    encoding: str
    field: str | None = None  # to read of each line; None: the file is plain text


def split_files(files: Sequence[TextFile]) -> tuple[list[TextFile], list[TextFile]]:
    """Divides files into those for training and those for validation."""
    if len(files) >= VALIDATION_EVERY:
        train = [file for number, file in enumerate(files, 1) if number % VALIDATION_EVERY]
        return train, list(files[VALIDATION_EVERY - 1 :: VALIDATION_EVERY])
    sizes = [file.stop - file.start for file in files]
    offset = sum(sizes) * (VALIDATION_EVERY - 1) // VALIDATION_EVERY
    index = 0
    while offset >= sizes[index]:
        offset -= sizes[index]
        index += 1
    head, tail = _cut(files[index], files[index].start + offset)
    return [f for f in (*files[:index], head) if f.stop > f.start], [tail, *files[index + 1 :]]


def _cut(file: TextFile, offset: int) -> tuple[TextFile, TextFile]:
    """Cuts at the last start of a line at or before `offset`; at a character in a long line."""
    decoder = codecs.getincrementaldecoder(file.encoding)()
    newline = "\n".encode(file.encoding)
    cut, position = file.start, file.start
    for block in read_blocks(file._replace(stop=offset)):
        decoder.decode(block)
        index = block.rfind(newline)
        while index > 0 and index % len(newline):  # part of two characters of UTF-16
            index = block.rfind(newline, 0, index + len(newline) - 1)
        cut = position + index + len(newline) if index >= 0 else cut
        position += len(block)
    if file.field is None and (cut == file.start or offset - cut >= BLOCK_BYTES):
        cut = offset - len(decoder.getstate()[0])
    return file._replace(stop=cut), file._replace(start=cut)


def read_blocks(file: TextFile) -> Iterator[bytes]:
    try:
        with file.path.open("rb") as stream:
            stream.seek(file.start)
            for start in range(file.start, file.stop, BLOCK_BYTES):
                size = min(BLOCK_BYTES, file.stop - start)
                block = stream.read(size)
                if len(block) < size:
                    raise ValueError(f"{file.path} became shorter while it was read; try again")
                yield block
    except OSError as error:
        raise ValueError(
            f"{file.path} cannot be read ({error.strerror}); make it readable"
        ) from error


def read_documents(
    file: TextFile, advance: Callable[[int], None] = lambda _: None, *, stop: int | None = None
) -> Iterator[Iterable[str]]:
    """Yields the documents of a file, each as pieces of text that end at the end of a line.

    Calls `advance` with each number of bytes read. Leaves out what follows the byte `stop`, and the
    character or the line of JSON that it divides.
    """
    pieces = read_pieces(file, advance, stop)
    if file.field is None:
        yield pieces
        return
    number = 0
    for piece in pieces:
        for line in piece.removesuffix("\n").split("\n"):
            number += 1
            if line.strip() and (text := _read_field(line, file, number)):
                yield [text]


def read_pieces(
    file: TextFile, advance: Callable[[int], None] = lambda _: None, stop: int | None = None
) -> Iterator[str]:
    stop = file.stop if stop is None else min(stop, file.stop)
    is_whole = stop == file.stop
    decoder = codecs.getincrementaldecoder(file.encoding)()
    text = ""
    for block in read_blocks(file._replace(stop=stop)):
        advance(len(block))
        text += decoder.decode(block)
        cut = text.rfind("\n") + 1
        if not cut and file.field is None:
            cut = len(text) // MAX_LINE * MAX_LINE
        if cut:
            yield text[:cut]
            text = text[cut:]
    text += decoder.decode(b"", final=is_whole)
    if text and (is_whole or file.field is None):
        yield text


def _read_field(line: str, file: TextFile, number: int) -> str:
    """Returns the text of one line of JSON Lines; raises ValueError for another line."""
    where, field = f"data {file.path}, line {number}", file.field
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = str(error)
        if isinstance(error, json.JSONDecodeError):
            why = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{where} is not JSON ({why}); correct or remove it") from error
    if not isinstance(item, dict):
        raise ValueError(f"{where} is not a JSON object; correct or remove it")
    if field not in item:
        raise ValueError(f"{where} has no field {field}; {describe_fields(item)}")
    value = item[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field} is {json.dumps(value)[:40]}; it must be text")
    if "\\u" in line and (half := re.search("[\ud800-\udfff]", value)):
        raise ValueError(f"{where}: {field} holds {half[0]!a}, half a character; correct it")
    return value


def describe_fields(item: Mapping[str, Any]) -> str:
    names = [name for name, value in item.items() if isinstance(value, str) and name.isprintable()]
    return f"its string fields are {', '.join(names[:20])}" if names else "it has no string fields"
