"""Tokenizes text files once into memory-mapped token files, which are cached.

Processes that start together build an entry of the cache once. An entry is a folder: train.bin and
validation.bin (token ids), tokenizer.json, and meta.json, written last. Each file is a document.
"""

import codecs
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from filelock import FileLock
from rich import progress
from rich.console import Console
from tokenizers import Tokenizer

from unitransformer.data.tokenizer import Encoder, TokenArray, TokenizerKind, build_tokenizer
from unitransformer.files import CACHE_FOLDER, cache_folder
from unitransformer.record.units import format_count

FORMAT_VERSION = 2  # of a cache entry; raise it when the same text gives different contents
BLOCK_BYTES = 1 << 20
MAX_LINE = 4 << 20  # characters; a longer line is cut
# Training a tokenizer takes up to 100 bytes of memory per byte of text (if words rarely repeat).
# With 16 MB of the standard library instead of 8, the text would have 0.3 % fewer tokens.
TRAINING_BYTES = 8_000_000
VALIDATION_EVERY = 20  # every 20th file, or the last 1/20 of the bytes if there are fewer files
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens of a text, split for training and validation."""

    train: TokenArray  # memory-mapped, 1-D
    validation: TokenArray  # the same; shares no text with `train`
    tokenizer: Tokenizer
    sha256: str  # of the bytes of all files, sorted by path
    description: str


class _Span(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class _Text:
    """The text files of a source, sorted by path."""

    files: tuple[_Span, ...]
    num_bytes: int
    sha256: str
    description: str


def load_corpus(
    source: str,
    *,
    kind: TokenizerKind,
    vocab_size: int,
    cache_dir: Path | None = None,
    show_progress: bool = False,
) -> Corpus:
    """Tokenizes `source`, or loads its tokens from the cache.

    Args:
        source: "builtin" (the Python standard library), a text file or a folder of text files.
        cache_dir: None: $UNITRANSFORMER_CACHE, or else the user's cache folder.

    Raises:
        ValueError: there is no text, too little text, or the vocabulary is below its alphabet.
        OSError: the cache cannot be written.
    """
    text = _find_text(source)
    cache = cache_dir or cache_folder()
    entry = cache / _entry_name(text, kind, vocab_size)
    try:
        if not _is_complete(entry):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(entry.with_suffix(".lock")):
                if not _is_complete(entry):
                    _write_entry(entry, text, kind, vocab_size, show_progress=show_progress)
        dtype = json.loads((entry / "meta.json").read_bytes())["dtype"]
        return Corpus(
            train=np.memmap(entry / "train.bin", dtype=dtype, mode="r"),
            validation=np.memmap(entry / "validation.bin", dtype=dtype, mode="r"),
            tokenizer=Tokenizer.from_file(str(entry / "tokenizer.json")),
            sha256=text.sha256,
            description=text.description,
        )
    except OSError as error:
        raise OSError(
            f"the corpus cache {cache} cannot be used ({error}); "
            f"set {CACHE_FOLDER} to a writable folder with room"
        ) from error


def builtin_files() -> list[Path]:
    """Returns the Python files of the standard library without its tests, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in _walk(root, skip=EXCLUDED) if path.suffix == ".py"]


def _walk(root: Path, *, skip: set[str]) -> list[Path]:
    """Returns the visible files below `root`, sorted by path."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed ({error.strerror}); make it readable")

    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [n for n in subfolders if n not in skip and not n.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    files = [path for path in paths if path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _find_text(source: str) -> _Text:
    path = Path(source).expanduser()
    if source == "builtin":
        name = f"Python {platform.python_version()} standard library source"
        paths = builtin_files()
    elif path.exists():
        name = path.resolve().name
        paths = _walk(path, skip=set()) if path.is_dir() else [path]
    else:
        raise ValueError(f"data {source} does not exist; give a file, a folder or 'builtin'")
    spans = [_Span(path, 0, path.stat().st_size) for path in paths]
    files = tuple(span for span in spans if span.stop and not _is_binary(span))
    if not files:
        raise ValueError(f"data {source} holds no text; give text files that are not empty")
    num_bytes = sum(file.stop for file in files)
    description = f"{name}, {format_count(len(files), 'file')}, {_format_size(num_bytes)}"
    if num_binary := sum(bool(span.stop) for span in spans) - len(files):
        description += f", {format_count(num_binary, 'binary file')} skipped"
    return _Text(files=files, num_bytes=num_bytes, sha256=_hash(files), description=description)


def _is_binary(file: _Span) -> bool:
    return any(b"\0" in block for block in _read_blocks(file._replace(stop=min(file.stop, 8192))))


def _split(files: Sequence[_Span]) -> tuple[list[_Span], list[_Span]]:
    """Divides `files` into spans for training and spans for validation."""
    if len(files) >= VALIDATION_EVERY:
        train = [file for number, file in enumerate(files, 1) if number % VALIDATION_EVERY]
        return train, list(files[VALIDATION_EVERY - 1 :: VALIDATION_EVERY])
    offset = sum(file.stop for file in files) * (VALIDATION_EVERY - 1) // VALIDATION_EVERY
    index = 0
    while offset >= files[index].stop:
        offset -= files[index].stop
        index += 1
    path, _, stop = files[index]
    cut = _line_start(path, offset)
    before = [*files[:index], _Span(path, 0, cut)]
    after = [_Span(path, cut, stop), *files[index + 1 :]]
    return [span for span in before if span.stop > span.start], after


def _line_start(path: Path, offset: int) -> int:
    """Returns the last start of a line at or before `offset`; of a character in a long line."""
    first = max(0, offset - BLOCK_BYTES)
    before = b"".join(_read_blocks(_Span(path, first, offset)))
    if newline := before.rfind(b"\n") + 1:
        return first + newline
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(before)
    unfinished, _ = decoder.getstate()
    return offset - len(unfinished)


def _read_blocks(span: _Span) -> Iterator[bytes]:
    try:
        with span.path.open("rb") as file:
            file.seek(span.start)
            for start in range(span.start, span.stop, BLOCK_BYTES):
                size = min(BLOCK_BYTES, span.stop - start)
                block = file.read(size)
                if len(block) < size:
                    raise ValueError(f"{span.path} became shorter while it was read; try again")
                yield block
    except OSError as error:
        raise ValueError(
            f"{span.path} cannot be read ({error.strerror}); make it readable"
        ) from error


def _read_pieces(span: _Span, advance: Callable[[int], None]) -> Iterator[str]:
    """Yields the text of `span` in pieces of whole lines; calls `advance` with the bytes read."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    for block in _read_blocks(span):
        advance(len(block))
        text += decoder.decode(block)
        if cut := text.rfind("\n") + 1 or len(text) // MAX_LINE * MAX_LINE:
            yield text[:cut]
            text = text[cut:]
    if text := text + decoder.decode(b"", final=True):
        yield text


def _read_sample(spans: Sequence[_Span]) -> list[str]:
    """Returns the start of the text, to train a tokenizer on."""
    sample: list[str] = []
    num_left = TRAINING_BYTES
    for span in spans:
        head = span._replace(stop=min(span.stop, span.start + num_left))
        sample += _read_pieces(head, lambda _: None)
        num_left -= head.stop - head.start
        if not num_left:
            break
    return sample


def _hash(files: Sequence[_Span]) -> str:
    """Returns the SHA-256 of the files; raises ValueError if they hold only white space."""
    digest = hashlib.sha256()
    is_blank = True
    for file in files:
        for block in _read_blocks(file):
            digest.update(block)
            is_blank = is_blank and block.isspace()
    if is_blank:
        raise ValueError(f"{files[0].path} holds only white space; give files with text")
    return digest.hexdigest()


def _entry_name(text: _Text, kind: TokenizerKind, vocab_size: int) -> str:
    # With the sizes, because the same bytes in different files are different documents.
    sizes = [file.stop for file in text.files]
    key = [FORMAT_VERSION, tokenizers.__version__, kind, vocab_size, text.sha256, sizes]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _is_complete(entry: Path) -> bool:
    try:
        file_bytes: dict[str, int] = json.loads((entry / "meta.json").read_bytes())["file_bytes"]
        return all((entry / name).stat().st_size == size for name, size in file_bytes.items())
    except (FileNotFoundError, KeyError, ValueError):
        return False


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` on success; the caller holds the lock."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)  # it is damaged
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_entry(
    entry: Path, text: _Text, kind: TokenizerKind, vocab_size: int, *, show_progress: bool
) -> None:
    parts = dict(zip(("train", "validation"), _split(text.files), strict=True))
    with _new_folder(entry) as folder, _progress(text.num_bytes, show=show_progress) as advance:
        sample = _read_sample(parts["train"])
        tokenizer = build_tokenizer(sample, kind=kind, vocab_size=vocab_size)
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        encoder = Encoder(tokenizer, kind=kind)
        for name, spans in parts.items():
            _write_tokens(folder / f"{name}.bin", spans, encoder, advance)
        file_bytes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        meta = {
            "dtype": encoder.dtype.name,
            "num_tokens": {n: file_bytes[f"{n}.bin"] // encoder.dtype.itemsize for n in parts},
            "file_bytes": file_bytes,
            "sha256": text.sha256,
            "description": text.description,
            "num_bytes": text.num_bytes,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _write_tokens(
    path: Path, spans: Sequence[_Span], encoder: Encoder, advance: Callable[[int], None]
) -> None:
    with path.open("wb") as file:
        for index, span in enumerate(spans):
            # Not `ndarray.tofile`, which raises nothing on a full disk.
            file.write(encoder.separator if index else b"")
            file.writelines(map(encoder.encode, _read_pieces(span, advance)))
        if not file.tell():
            raise ValueError(f"the text is too short for a {path.stem} part; give more text")


@contextmanager
def _progress(num_bytes: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with each number of bytes read; shows a bar in a terminal."""
    size, started_at_s = _format_size(num_bytes), time.perf_counter()
    if show and sys.stderr.isatty():
        columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
        with progress.Progress(
            "tokenizing", *columns, progress.TimeRemainingColumn(), console=Console(stderr=True)
        ) as bar:
            task = bar.add_task("tokenizing", total=num_bytes)
            yield lambda advance: bar.advance(task, advance)
        return
    if show:
        print(f"tokenizing {size} ...", file=sys.stderr, flush=True)
    yield lambda _: None
    if show:
        elapsed_s = time.perf_counter() - started_at_s
        print(f"tokenized {size} in {elapsed_s:.1f} s", file=sys.stderr, flush=True)


def _format_size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return format_count(num_bytes, "byte")
