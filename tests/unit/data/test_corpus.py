"""Tests the corpus: text files become cached token files with separate training and validation."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.processes import PATIENCE_S
from unitransformer.data import corpus, documents
from unitransformer.data import tokenizer as tokenization
from unitransformer.data.corpus import load_corpus
from unitransformer.data.text_files import builtin_files
from unitransformer.data.tokenizer import (
    SPECIAL_TOKENS,
    Encoder,
    TokenArray,
    TokenizerKind,
    build_tokenizer,
    token_dtype,
)

KINDS: tuple[TokenizerKind, ...] = ("bpe", "wordpiece")
SENTENCES = Path(argparse.__file__).read_text(encoding="utf-8")  # 100 kB, 2,700 lines
ODD_TEXT = "naïve café 北京 😀 it's\tfive  spaces\r\n\x0c\x01end\u3000of <|endoftext|> [SEP] line\n"

# Whole words are tokens, so cutting or joining words changes the tokens.
UNICODE = "caf\u00e9 (\u00bf) 1\u00b2 e\u0301t a\x01b ..\x01.. 1\u0663 c\x1cd \u3000\x85 \n \n  x\n"
CONTRACTIONS = "it's they're I'm he'll I've she'd don't 's ''s 'st abc123... x1y2 __init__ --\n"


def _load(source: Path, cache: Path, kind: TokenizerKind = "bpe") -> corpus.Corpus:
    return load_corpus(str(source), kind=kind, vocab_size=600, cache_dir=cache)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def _decode(tokens: TokenArray, tokenizer: Tokenizer) -> list[str]:
    """Returns the decoded documents."""
    separators = np.flatnonzero(tokens == 0)
    return [
        tokenizer.decode(document[document != 0].tolist())
        for document in np.split(tokens, separators)
    ]


def _start(script: str, *arguments: Path | str) -> subprocess.Popen[str]:
    """Runs `script`, with `corpus` imported, in a new process."""
    imports = (
        "import json, os, sys; from pathlib import Path; from unitransformer.data import corpus"
    )
    return subprocess.Popen(
        [sys.executable, "-c", f"{imports}\n{script}", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(corpus.__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    return stdout, stderr


LOAD = """
loaded = corpus.load_corpus(sys.argv[1], kind=sys.argv[3], vocab_size=600,
                            cache_dir=Path(sys.argv[2]), show_progress=True)
print(json.dumps([loaded.sha256, len(loaded.train), int(loaded.train.sum()),
                  loaded.tokenizer.to_str()]))
assert "charset_normalizer" not in sys.modules  # it guesses the encoding of refused text only
"""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> TokenizerKind:
    return KINDS[KINDS.index(request.param)]


@pytest.fixture(scope="module")
def tokenizer(kind: TokenizerKind) -> Tokenizer:
    return build_tokenizer([SENTENCES, (UNICODE + CONTRACTIONS) * 500], kind=kind, vocab_size=600)


# ---- tokenizers


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer, kind: TokenizerKind) -> None:
    names = SPECIAL_TOKENS[kind]
    assert [tokenizer.token_to_id(name) for name in names] == list(range(len(names)))
    assert SPECIAL_TOKENS["bpe"] == ("<|endoftext|>",)
    assert SPECIAL_TOKENS["wordpiece"] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def test_the_vocabulary_has_the_requested_size_without_gaps(tokenizer: Tokenizer) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(600))


def test_wordpiece_keeps_the_case_of_letters() -> None:
    tokenizer = build_tokenizer([SENTENCES], kind="wordpiece", vocab_size=600)
    assert tokenizer.decode(tokenizer.encode("Help HELP help").ids) == "Help HELP help"


def test_a_vocabulary_below_special_tokens_and_alphabet_is_refused(kind: TokenizerKind) -> None:
    least = {"bpe": 1 + 256, "wordpiece": 5 + 3 + 3}[kind]  # a b c ##a ##b ##c
    for size in (least - 1, 0, -1):
        with pytest.raises(ValueError, match=f"model.num-classes {size} .* at least {least}"):
            build_tokenizer(["abc cab bca\n"], kind=kind, vocab_size=size)
    trained = build_tokenizer(["abc cab bca\n"], kind=kind, vocab_size=least)
    assert trained.get_vocab_size() == least


def test_a_small_text_gives_a_smaller_vocabulary_than_asked() -> None:
    assert build_tokenizer(["aab"], kind="bpe", vocab_size=9_000).get_vocab_size() < 270


def test_token_ids_take_two_bytes_up_to_65536_tokens() -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


CHARACTERS = st.one_of(
    st.sampled_from(
        "ab Z09 '.,_ \n\t\r\x0b\x0c\x00\x01\x1c\x7f\x85\xa0\u0301é中😀\u2028\u3000٣²ª\ufffd"
    ),
    st.characters(exclude_categories=["Cs"]),
)
TEXTS = st.lists(
    st.one_of(CHARACTERS, st.sampled_from([*SPECIAL_TOKENS["bpe"], "[SEP]", "'re", "  the"]))
).map("".join)


@settings(max_examples=300, deadline=None, database=None)
@given(text=TEXTS)
@example(text=UNICODE)
@example(text=CONTRACTIONS)
def test_encoding_word_by_word_gives_the_ids_of_the_whole_text(
    tokenizer: Tokenizer, kind: TokenizerKind, text: str
) -> None:
    encoder = Encoder(tokenizer, kind=kind)
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.encode_special_tokens = True
    ids = np.frombuffer(encoder.encode(text), dtype=encoder.dtype)
    assert ids.tolist() == whole.encode(text, add_special_tokens=False).ids


def test_an_encoder_with_an_emptied_cache_gives_the_same_ids(
    tokenizer: Tokenizer, kind: TokenizerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembering = Encoder(tokenizer, kind=kind).encode(SENTENCES)
    monkeypatch.setattr(tokenization, "WORD_CACHE_BYTES", 1_000)
    forgetting = Encoder(tokenizer, kind=kind)
    lines = SENTENCES.splitlines(keepends=True)
    for line in lines:
        forgetting.encode(line)
        assert len(forgetting._ids) < 100
    assert forgetting.encode(SENTENCES) == remembering


def test_a_long_word_trains_within_five_seconds() -> None:
    letters = np.random.default_rng(0).choice(list("ACGT"), size=200_000)
    started_at_s = time.process_time()
    build_tokenizer(["".join(letters)], kind="bpe", vocab_size=500)
    # 0.3 s with words cut into pieces, otherwise 15 s.
    assert time.process_time() - started_at_s < 5


@pytest.mark.parametrize("kind", KINDS)
def test_equal_texts_give_equal_tokenizers_in_different_processes(
    tmp_path: Path, kind: TokenizerKind
) -> None:
    source = _write(tmp_path / "text.txt", SENTENCES)
    runs = [_start(LOAD, source, tmp_path / f"cache{run}", kind) for run in range(3)]
    first, second, third = (_finish(run)[0] for run in runs)
    assert first == second == third


# ---- splitting and streaming


def test_decoded_parts_of_one_file_are_its_text(tmp_path: Path) -> None:
    text = (ODD_TEXT + SENTENCES) * 2
    loaded = _load(_write(tmp_path / "text.txt", text), tmp_path / "cache")
    (train,), (validation,) = (
        _decode(part, loaded.tokenizer) for part in (loaded.train, loaded.validation)
    )
    assert train + validation == text
    assert train.endswith("\n")
    assert len(validation.encode()) == pytest.approx(len(text.encode()) * 0.05, rel=0.02)


@pytest.mark.parametrize("num_files", [3, 19])
def test_few_files_are_split_by_bytes(tmp_path: Path, num_files: int) -> None:
    texts = [f"file {i}\n" * 40 for i in range(num_files)]
    for i, text in enumerate(texts):
        _write(tmp_path / "texts" / f"{i:02}.txt", text)
    loaded = _load(tmp_path / "texts", tmp_path / "cache")
    train = _decode(loaded.train, loaded.tokenizer)
    validation = _decode(loaded.validation, loaded.tokenizer)
    assert "".join(train + validation) == "".join(texts)
    assert len("".join(validation)) == pytest.approx(len("".join(texts)) * 0.05, abs=10)
    assert len(train) in (num_files - 1, num_files)


def test_the_last_of_twenty_files_is_for_validation(tmp_path: Path) -> None:
    texts = [f"this is file {i}\nwith two lines" for i in range(20)]
    for i, text in enumerate(texts):
        _write(tmp_path / "texts" / f"folder{i % 2}" / f"{i:02}.txt", text)
    in_order = texts[0::2] + texts[1::2]  # folder0 comes before folder1
    loaded = _load(tmp_path / "texts", tmp_path / "cache")
    assert _decode(loaded.train, loaded.tokenizer) == in_order[:19]
    assert _decode(loaded.validation, loaded.tokenizer) == in_order[19:]


def test_wordpiece_puts_sep_between_files(tmp_path: Path) -> None:
    for i in range(40):
        _write(tmp_path / "texts" / f"{i:02}.txt", f"words of file {i} [SEP]\n")
    loaded = _load(tmp_path / "texts", tmp_path / "cache", kind="wordpiece")
    assert np.count_nonzero(loaded.train == 3) == 37  # between 38 files
    assert np.count_nonzero(loaded.validation == 3) == 1


@pytest.mark.parametrize("text", [SENTENCES, ODD_TEXT * 99, "né" * 5_000, "中" * 5_000 + "\n"])
def test_the_size_of_a_block_does_not_change_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 100)
    monkeypatch.setattr(documents, "MAX_LINE", 333)
    loaded = _load(_write(tmp_path / "text.txt", text), tmp_path / "cache")
    parts = (
        *_decode(loaded.train, loaded.tokenizer),
        *_decode(loaded.validation, loaded.tokenizer),
    )
    assert "".join(parts) == text


def test_reading_in_blocks_hardly_changes_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _write(tmp_path / "text.txt", SENTENCES)
    whole = _load(source, tmp_path / "cache1")
    monkeypatch.setattr(documents, "BLOCK_BYTES", 10_000)
    blocks = _load(source, tmp_path / "cache2")
    assert abs(len(whole.train) - len(blocks.train)) <= 2 * len(SENTENCES) / 10_000


def test_the_builtin_corpus_is_the_standard_library_without_tests_and_packages() -> None:
    paths = builtin_files()
    parts = {part for path in paths for part in path.parts}
    assert Path(argparse.__file__) in paths
    assert len(paths) > 400
    assert {path.suffix for path in paths} == {".py"}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    # Not getrusage: the peak of a child starts at that of its parent.
    measure = """
corpus.TRAINING_BYTES = 500_000
corpus.load_corpus(sys.argv[1], kind="bpe", vocab_size=600, cache_dir=Path(sys.argv[2]))
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""
    text = SENTENCES * (5_000_000 // len(SENTENCES))
    sources = [_write(tmp_path / f"{n}.txt", text * n) for n in (1, 8)]
    small_mib, large_mib = (
        int(_finish(_start(measure, source, tmp_path / "cache"))[0]) for source in sources
    )
    assert large_mib - small_mib < 30


# ---- the cache


def test_the_second_load_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _write(tmp_path / "text.txt", SENTENCES)
    first = _load(source, tmp_path / "cache")
    monkeypatch.setattr(corpus, "_write_entry", None)
    second = _load(source, tmp_path / "cache")
    assert isinstance(second.train, np.memmap)
    assert np.array_equal(first.train, second.train)
    assert second.tokenizer.to_str() == first.tokenizer.to_str()


def test_an_environment_variable_sets_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path / "cache"))
    source = _write(tmp_path / "text.txt", SENTENCES)
    load_corpus(str(source), kind="bpe", vocab_size=300)
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    assert json.loads(meta.read_text())["num_bytes"] == len(SENTENCES.encode())


def test_another_text_vocabulary_or_tokenizer_is_another_cache_entry(tmp_path: Path) -> None:
    source = _write(tmp_path / "text.txt", SENTENCES)
    for kind in KINDS:
        _load(source, tmp_path / "cache", kind)
    load_corpus(str(source), kind="bpe", vocab_size=400, cache_dir=tmp_path / "cache")
    _load(_write(source, SENTENCES.replace("argparse", "argument")), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 4


def test_the_same_bytes_in_other_files_are_another_cache_entry(tmp_path: Path) -> None:
    one = _load(_write(tmp_path / "one" / "a", "line\n" * 100).parent, tmp_path / "cache")
    for name in ("a", "b"):
        _write(tmp_path / "two" / name, "line\n" * 50)
    two = _load(tmp_path / "two", tmp_path / "cache")
    assert one.sha256 == two.sha256
    assert len(two.train) == len(one.train) + 1  # the separator


def test_another_encoding_or_field_is_another_cache_entry(tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    source.write_text('{"a": "déjà vu", "b": "ça va"}\n' * 50, encoding="cp1252")
    for encoding, field in (("cp1252", "a"), ("cp1252", "b"), ("iso8859-1", "a"), ("cp1252", "a")):
        load_corpus(
            str(source),
            kind="bpe",
            vocab_size=300,
            encoding=encoding,
            field=field,
            cache_dir=tmp_path / "cache",
        )
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 3


def test_processes_that_start_together_build_the_cache_entry_once(tmp_path: Path) -> None:
    source = _write(tmp_path / "text.txt", SENTENCES)
    runs = [_start(LOAD, source, tmp_path / "cache", "bpe") for _ in range(4)]
    results = [_finish(run) for run in runs]
    assert len({stdout for stdout, _ in results}) == 1
    assert sorted(stderr.count("tokenizing") for _, stderr in results) == [0, 0, 0, 1]


def test_a_killed_builder_does_not_block_the_next_one(tmp_path: Path) -> None:
    source = _write(tmp_path / "text.txt", SENTENCES)
    die = "corpus.read_documents = lambda file, advance: os.kill(os.getpid(), 9)\n"
    start = "corpus._read_sample = lambda files: ['some text']\n"
    killed = _start(start + die + LOAD, source, tmp_path / "cache", "bpe")
    killed.communicate(timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "cache").glob("*.partial/*")] != []
    loaded = _load(source, tmp_path / "cache")
    (train,) = _decode(loaded.train, loaded.tokenizer)
    assert SENTENCES.startswith(train)
    assert list((tmp_path / "cache").glob("*.partial")) == []


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_a_damaged_cache_entry_is_built_again(tmp_path: Path, name: str, damage: str) -> None:
    source = _write(tmp_path / "text.txt", SENTENCES[:20_000])
    before = np.array(_load(source, tmp_path / "cache").train)
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    assert np.array_equal(_load(source, tmp_path / "cache").train, before)


# ---- what the user did wrong


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("missing", None, "does not exist; give a file, a folder or 'builtin'"),
        ("folder/", None, "holds no text; give text files"),
        ("empty.txt", "", "holds no text; give text files"),
        ("binary.txt", "a\0b", "holds no text, but 1 binary (binary.txt); unpack or convert"),
        ("blank.txt", " \n\t\n", "holds only white space; give files with text"),
        ("short.txt", "a", "nothing for train; give more text"),
    ],
)
def test_a_source_without_text_is_refused(
    tmp_path: Path, name: str, contents: str | None, message: str
) -> None:
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    elif contents is not None:
        _write(tmp_path / name, contents)
    for kind in KINDS:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            _load(tmp_path / name, tmp_path / "cache", kind)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("cache/*.partial")) == []


def test_a_cache_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    source = _write(tmp_path / "text.txt", SENTENCES)
    with pytest.raises(OSError, match=r"cache .*text\.txt.*set UNITRANSFORMER_CACHE"):
        _load(source, source / "cache")


def test_a_full_disk_is_reported_with_the_cache_folder(tmp_path: Path) -> None:
    source = _write(tmp_path / "text.txt", SENTENCES)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
    process = _start(limit + LOAD, source, tmp_path / "cache", "bpe")
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert stderr.splitlines()[-1].startswith(f"OSError: the corpus cache {tmp_path / 'cache'} ")
    assert "set UNITRANSFORMER_CACHE" in stderr
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
