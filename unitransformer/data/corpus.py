"""Tokenizes text files once into memory-mapped token files, which are cached.

Processes that start together build an entry of the cache once. An entry is a folder: train.bin and
validation.bin (token ids), tokenizer.json, and meta.json, written last.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from filelock import FileLock
from rich import progress
from rich.console import Console
from tokenizers import Tokenizer

from unitransformer.data.documents import TextFile, read_documents, split_files
from unitransformer.data.text_files import TextSource, check_text, find_text, format_size
from unitransformer.data.tokenizer import Encoder, TokenArray, TokenizerKind, build_tokenizer
from unitransformer.files import CACHE_FOLDER, cache_folder

FORMAT_VERSION = 3  # of a cache entry; raise it when the same text gives different contents
# Training a tokenizer takes up to 100 bytes of memory per byte of text (if words rarely repeat).
# With 16 MB of the standard library instead of 8, the text would have 0.3 % fewer tokens.
TRAINING_BYTES = 8_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens of a text, split for training and validation."""

    train: TokenArray  # memory-mapped, 1-D
    validation: TokenArray  # the same; shares no text with `train`
    tokenizer: Tokenizer
    sha256: str  # of the bytes of all files, sorted by path
    description: str


def load_corpus(
    source: str,
    *,
    kind: TokenizerKind,
    vocab_size: int,
    encoding: str = "utf-8",
    field: str | None = None,
    cache_dir: Path | None = None,
    show_progress: bool = False,
) -> Corpus:
    """Tokenizes `source`, or loads its tokens from the cache.

    Args:
        source: "builtin" (the Python standard library), a text file or a folder of text files.
        encoding: of the text files, by the name that `codecs.lookup` gives it.
        field: the field to read of each line of JSON Lines files.
        cache_dir: None: $UNITRANSFORMER_CACHE, or else the user's cache folder.

    Raises:
        ValueError: there is no text, too little text, text in another encoding, a line without
            the field, or the vocabulary is below the text's alphabet.
        OSError: the cache cannot be written.
    """
    text = find_text(source, encoding=encoding, field=field)
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


def _read_sample(files: Sequence[TextFile]) -> list[str]:
    """Returns the start of the text, to train a tokenizer on."""
    sample: list[str] = []
    num_left = TRAINING_BYTES
    for file in files:
        if num_left <= 0:
            break
        documents = read_documents(file, stop=file.start + num_left)
        sample += chain.from_iterable(documents)
        num_left -= file.stop - file.start
    return sample


def _entry_name(text: TextSource, kind: TokenizerKind, vocab_size: int) -> str:
    # With the sizes, because the same bytes in different files are different documents.
    sizes = [file.stop for file in text.files]
    fields = {index: file.field for index, file in enumerate(text.files) if file.field is not None}
    key = [FORMAT_VERSION, tokenizers.__version__, kind, vocab_size, text.sha256, sizes]
    return hashlib.sha256(json.dumps([*key, text.encoding, fields]).encode()).hexdigest()


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
    entry: Path, text: TextSource, kind: TokenizerKind, vocab_size: int, *, show_progress: bool
) -> None:
    check_text(text)
    parts = dict(zip(("train", "validation"), split_files(text.files), strict=True))
    with _new_folder(entry) as folder, _progress(text.num_bytes, show=show_progress) as advance:
        sample = _read_sample(parts["train"])
        tokenizer = build_tokenizer(sample, kind=kind, vocab_size=vocab_size)
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        encoder = Encoder(tokenizer, kind=kind)
        for name, files in parts.items():
            _write_tokens(folder / f"{name}.bin", files, encoder, advance)
            if not (folder / f"{name}.bin").stat().st_size:
                raise ValueError(
                    f"data {text.description}: divided for training and validation, it leaves "
                    f"nothing for {name}; give more text or more lines"
                )
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
    path: Path, files: Sequence[TextFile], encoder: Encoder, advance: Callable[[int], None]
) -> None:
    with path.open("wb") as file:
        documents = chain.from_iterable(read_documents(item, advance) for item in files)
        for index, document in enumerate(documents):
            # Not `ndarray.tofile`, which raises nothing on a full disk.
            file.write(encoder.separator if index else b"")
            file.writelines(map(encoder.encode, document))


@contextmanager
def _progress(num_bytes: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with each number of bytes read; shows a bar in a terminal."""
    size, started_at_s = format_size(num_bytes), time.perf_counter()
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
