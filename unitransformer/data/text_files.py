"""Finds the text files of a source, and refuses those that are not what the config says.

Links to folders are followed; a file or folder that is reached in two ways counts once. Compressed
and binary files and links that lead nowhere are passed over, by name.
"""

import collections
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from unitransformer.data.documents import (
    TextFile,
    describe_fields,
    read_blocks,
    read_documents,
)
from unitransformer.data.text_encoding import (
    HEAD_BYTES,
    find_fault,
    likely_encodings,
    passed_over_kind,
    resolve_encoding,
)
from unitransformer.files import expand_home, printable
from unitransformer.record.units import format_count

SAMPLE_BYTES = 1 << 16  # from which an encoding is guessed
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
JSON_LINES = {".jsonl", ".ndjson"}  # and any file that begins with two lines that are objects


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """The text files of a source, sorted by path."""

    files: tuple[TextFile, ...]
    num_bytes: int
    sha256: str  # of the bytes of all files
    encoding: str
    description: str


def find_text(source: str, *, encoding: str, field: str | None) -> TextSource:
    """Lists the text files of `source`; raises ValueError if there are none."""
    path = Path(expand_home(source))
    if source == "builtin":
        name = f"Python {platform.python_version()} standard library source"
        path, paths = STANDARD_LIBRARY, builtin_files()
    elif path.exists():
        name = printable(path.resolve().name)
        paths = _walk(path) if path.is_dir() else [path]
    else:
        raise ValueError(f"data {source} does not exist; give a file, a folder or 'builtin'")
    found = [(item, _inspect(item, encoding, field)) for item in paths]
    files = [file for _, file in found if isinstance(file, TextFile) and file.stop > file.start]
    others = [(item, why) for item, why in found if isinstance(why, str)]
    passed_over = _format_others(path if path.is_dir() else path.parent, others)
    if not files:
        why = f", but {passed_over}; unpack or convert them, or" if others else ";"
        raise ValueError(f"data {source} holds no text{why} give text files that are not empty")
    num_bytes, num_json = sum(f.stop for f in files), sum(f.field is not None for f in files)
    parts = [name, format_count(len(files), "file"), format_size(num_bytes)]
    if encoding != "utf-8":
        parts.append(encoding)
    if field is not None:
        parts.append(f"field {field} of {format_count(num_json, 'JSON Lines file')}")
        if not num_json:
            raise ValueError(
                f"data-field is {field}, but data {source} holds no JSON Lines file (.jsonl, "
                ".ndjson, or one object per line); convert it, or leave out --data-field"
            )
    if others:
        parts[-1] += f"; {format_count(len(others), 'file')} passed over: {passed_over}"
    return TextSource(
        files=tuple(files),
        num_bytes=num_bytes,
        sha256=_hash(files),
        encoding=encoding,
        description=", ".join(parts),
    )


def builtin_files() -> list[Path]:
    """Returns the Python files of the standard library without its tests, sorted by path."""
    return [path for path in _walk(STANDARD_LIBRARY, skip=EXCLUDED) if path.suffix == ".py"]


def _walk(root: Path, *, skip: Collection[str] = ()) -> list[Path]:
    """Returns the visible files below `root`, and links that lead nowhere, sorted by path."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed ({error.strerror}); make it readable")

    paths: dict[str, Path] = {}  # by real path
    folders, seen = [root], set()
    for top in folders:  # links to folders are appended, so that real folders come first
        for folder, subfolders, names in os.walk(top, onerror=refuse):
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(n for n in subfolders if n not in skip and n[0] != ".")
            for path in (Path(folder, name) for name in subfolders):
                if path.is_symlink() and Path(real).is_relative_to(os.path.realpath(path)):
                    names.append(path.name)
                elif path.is_symlink():
                    folders.append(path)
            for path in (Path(folder, name) for name in names if name[0] != "."):
                if path.is_symlink():
                    paths.setdefault(os.path.realpath(path), path)
                else:
                    paths[os.path.join(real, path.name)] = path
    return sorted(paths.values(), key=lambda path: path.relative_to(root).as_posix())


def _inspect(path: Path, encoding: str, field: str | None) -> TextFile | str | None:
    """Returns a text file, or why it is passed over; None for what is neither file nor link."""
    suffix = path.suffix.lower()
    if not path.is_file():
        link = "circular link" if path.is_dir() else "broken link"
        return link if path.is_symlink() else None
    size = path.stat().st_size
    head = b"".join(read_blocks(TextFile(path, 0, min(size, HEAD_BYTES), encoding)))
    if kind := passed_over_kind(suffix, head, encoding):
        return kind
    name, start = resolve_encoding(encoding, head)
    file = TextFile(path, start, size, name)
    is_named_so = suffix in JSON_LINES
    first = None
    if is_named_so or head[start:].decode(name, "replace").lstrip().startswith("{"):
        first, is_followed = _first_line(file)
    if not is_named_so and (first is None or not is_followed):
        return file
    if field is None and size:
        known = "" if first is None else f"; {describe_fields(first)}"
        raise ValueError(f"data {path} is JSON Lines: choose a field with --data-field{known}")
    return file._replace(field=field)


def _first_line(file: TextFile) -> tuple[Mapping[str, Any] | None, bool]:
    """Returns the first line as a JSON object, and whether the next begins like another."""
    text = next(read_blocks(file), b"").decode(file.encoding, "replace").strip()
    line, _, more = text.partition("\n")
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        item = None
    return item if isinstance(item, dict) else None, more.lstrip().startswith("{")


def _format_others(root: Path, others: Sequence[tuple[Path, str]]) -> str:
    """Returns "2 compressed (a.gz, b.zst), 1 binary (c.bin)"."""
    parts = []
    for kind in sorted({kind for _, kind in others}, reverse=True):
        names = [path.relative_to(root).as_posix() for path, why in others if why == kind]
        shown = ", ".join([*names[:3], "..."] if len(names) > 3 else names)
        kind = format_count(len(names), kind) if "link" in kind else f"{len(names)} {kind}"
        parts.append(f"{kind} ({printable(shown)})")
    return ", ".join(parts)


def format_size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return format_count(num_bytes, "byte")


def _hash(files: Sequence[TextFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        for block in read_blocks(file._replace(start=0)):
            digest.update(block)
    return digest.hexdigest()


def check_text(text: TextSource) -> None:
    """Reads all files; raises ValueError for a wrong encoding, a broken line, or only blanks."""
    if faults := [
        (file, *fault) for file in text.files if (fault := _read_as(file, text.encoding))
    ]:
        file, offset, reason = faults[0]
        start, stop = max(0, offset - SAMPLE_BYTES), min(file.stop, offset + SAMPLE_BYTES)
        sample = b"".join(read_blocks(file._replace(start=start, stop=stop)))
        sample = sample[sample.find(b"\n") + 1 :] if start else sample
        cure = f"repair it or convert it to {text.encoding}"
        guesses = likely_encodings(sample, text.encoding)
        if likely := [name for name in guesses if not _read_as(file, name)]:
            cure = f"give --data-encoding {likely[0]}"
            if len(faults) < len(text.files):
                cure = f"convert it to {text.encoding}, or {cure} if all files are"
            cure = f"it may be {' or '.join(likely)}: {cure}"
        if len(text.files) > 1:
            cure += f" (found in {len(faults)} of {format_count(len(text.files), 'file')})"
        raise ValueError(
            f"data {file.path} is not {text.encoding} text: {reason} at offset {offset}; {cure}"
        )
    for file in text.files:
        if file.field is not None:
            collections.deque(read_documents(file), maxlen=0)
    documents = chain.from_iterable(map(read_documents, text.files))
    if all(piece.isspace() for document in documents for piece in document):
        raise ValueError(f"{text.files[0].path} holds only white space; give files with text")


def _read_as(file: TextFile, encoding: str) -> tuple[int, str] | None:
    """Returns the first byte at which a file is not text in `encoding`, and why."""
    head = b"".join(read_blocks(file._replace(start=0, stop=min(file.stop, HEAD_BYTES))))
    name, start = resolve_encoding(encoding, head)
    return find_fault(read_blocks(file._replace(start=start)), name, start)
