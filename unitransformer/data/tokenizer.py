"""Text in, token ids out: train a tokenizer, then encode a stream of text with it.

Two kinds: "bpe" is GPT's byte-level pair encoding, "wordpiece" is BERT's WordPiece, cased.
A word is a stretch of text that the tokenizer never looks across: encoding word by word is exact.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TokenizerKind = Literal["bpe", "wordpiece"]
TokenType = np.dtype[np.uint16] | np.dtype[np.uint32]
TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

NUM_CHARACTERS = 1_000  # of WordPiece's alphabet, as in BERT; a rarer one makes its word [UNK]
WORD_CACHE_BYTES = 64_000_000
TRAINING_WORD = 100  # characters; training's time is quadratic in the length of the longest word
_WORD_BYTES = 250  # what Python takes to remember a word, besides its letters

# A run of ASCII is a word of its own only where no other character follows: whether that would
# join the run is for the tokenizer's Unicode tables to say, so all up to the next space goes there.
_ALONE = r"(?![^ -~\t\n\r])"
_PUNCTUATION = r"!-/:-@\[-`{-~"
# Unicode White_Space. Python's \s has four separators more, which the tokenizer takes for letters.
_SPACE = r" \t\n\x0b\x0c\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# GPT-2's pattern, its commonest case first.
_BPE_WORD = re.compile(
    rf" ?[A-Za-z]++{_ALONE}|'(?:[stmd]|re|ve|ll)| ?[{_PUNCTUATION}]++{_ALONE}| ?[0-9]++{_ALONE}"
    rf"| ?[^{_SPACE}]++|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)
_WORDPIECE_WORD = re.compile(rf"[A-Za-z0-9]++{_ALONE}|[{_PUNCTUATION}]|[^ \t\n\r]+")


def special_tokens(kind: TokenizerKind) -> tuple[str, ...]:
    """The tokens that stand for no text; their ids are 0, 1, 2 ... in this order."""
    match kind:
        case "bpe":
            return ("<|endoftext|>",)
        case "wordpiece":
            return ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        case unknown:
            assert_never(unknown)


def separator_token(kind: TokenizerKind) -> str:
    """The special token that stands between two documents."""
    return "<|endoftext|>" if kind == "bpe" else "[SEP]"


def token_dtype(vocab_size: int) -> TokenType:
    """The narrowest type that holds every id."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def build_tokenizer(texts: Sequence[str], *, kind: TokenizerKind, vocab_size: int) -> Tokenizer:
    """Train a tokenizer; equal texts give equal tokenizers, byte for byte.

    The vocabulary is smaller than `vocab_size` where the text is too small to fill it.

    Raises:
        ValueError: the special tokens and the alphabet alone exceed `vocab_size`.
    """
    room = max(vocab_size, 0)  # the trainers overflow on less, before it is refused below
    match kind:
        case "bpe":
            tokenizer = _build_bpe(texts, room)
        case "wordpiece":
            tokenizer = _build_wordpiece(texts, room)
        case unknown:
            assert_never(unknown)
    # With nothing left to fill, the trainers stop at the special tokens and the alphabet.
    if (least := tokenizer.get_vocab_size()) > vocab_size:
        raise ValueError(
            f"vocabulary_size {vocab_size} is below the {least} entries that the special "
            f"tokens and the alphabet of this text take with {kind}; give at least {least}"
        )
    return tokenizer


def _build_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens("bpe")),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # it would print to stdout
    )
    _train(tokenizer, texts, trainer)
    return tokenizer


def _build_wordpiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    characters = _count_characters(texts)
    # Left alone, the trainer numbers the "##" characters (and picks among equally rare ones) in
    # the order of a randomly seeded hash table, and breaks ties between merges by those numbers:
    # each run gives another vocabulary. Listed as special tokens they are numbered as listed.
    alphabet = [*characters, *(f"##{c}" for c in characters if _continues_word(c))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special_tokens("wordpiece"), *alphabet],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,  # it would print to stdout
    )
    trained = _wordpiece_tokenizer({})
    _train(trained, texts, trainer)
    # A new tokenizer, because the trained one would find the alphabet as special tokens in text.
    tokenizer = _wordpiece_tokenizer(trained.get_vocab())
    tokenizer.add_special_tokens(list(special_tokens("wordpiece")))
    return tokenizer


def _train(tokenizer: Tokenizer, texts: Sequence[str], trainer: trainers.Trainer) -> None:
    """Train with long words chopped up: a megabyte without a space would take hours."""
    whole = tokenizer.pre_tokenizer
    chop = pre_tokenizers.FixedLength(length=TRAINING_WORD)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([whole, chop])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = whole


def _wordpiece_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _count_characters(texts: Sequence[str]) -> list[str]:
    """The commonest characters that BERT's normalizer leaves, in order of code point."""
    normalizer = normalizers.BertNormalizer(lowercase=False)
    counts = Counter(chain.from_iterable(normalizer.normalize_str(text) for text in texts))
    del counts[" "]
    return sorted(sorted(counts, key=lambda c: (-counts[c], c))[:NUM_CHARACTERS])


def _continues_word(character: str) -> bool:
    """Whether a letter and this character are one word: not so for punctuation and Chinese."""
    text = normalizers.BertNormalizer(lowercase=False).normalize_str(f"a{character}")
    return len(pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)) == 1


class Encoder:
    """Text in, the bytes of its token ids out: the ids that `tokenizer.encode` gives.

    Text repeats its words, so the tokenizer sees each distinct word once and a dictionary does
    the rest. Special tokens spelled out in the text stay text: no document can fake its end.
    """

    def __init__(self, tokenizer: Tokenizer, *, kind: TokenizerKind) -> None:
        self.dtype = token_dtype(tokenizer.get_vocab_size())
        self.separator = self._to_bytes([special_tokens(kind).index(separator_token(kind))])
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._find_words = (_BPE_WORD if kind == "bpe" else _WORDPIECE_WORD).findall
        self._ids: dict[str, bytes] = {}
        self._num_bytes = 0

    def encode(self, text: str) -> bytes:
        """The ids of `text`, without a separator, as `self.dtype`."""
        words = self._find_words(text)
        self._learn(words)
        return b"".join(map(self._ids.__getitem__, words))

    def _learn(self, words: Sequence[str]) -> None:
        if self._num_bytes > WORD_CACHE_BYTES:
            self._ids, self._num_bytes = {}, 0
        new = list(set(words).difference(self._ids))
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        for word, encoding in zip(new, encodings, strict=True):
            self._ids[word] = self._to_bytes(encoding.ids)
        self._num_bytes += sum(map(len, new)) + _WORD_BYTES * len(new)

    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()
