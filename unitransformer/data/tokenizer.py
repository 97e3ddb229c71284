"""Trains a BPE or WordPiece tokenizer and encodes text with it.

"bpe" is GPT's byte-level byte-pair encoding, "wordpiece" is BERT's cased WordPiece. A word is a
span of text that the tokenizer splits off first, so encoding word by word gives the same ids.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TokenizerKind = Literal["bpe", "wordpiece"]
TokenType = np.dtype[np.uint16] | np.dtype[np.uint32]
TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

# The tokens that represent no text; their ids are 0, 1, 2 ... in this order.
SPECIAL_TOKENS: Mapping[TokenizerKind, tuple[str, ...]] = {
    "bpe": ("<|endoftext|>",),
    "wordpiece": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
}
NUM_CHARACTERS = 1_000  # WordPiece's alphabet, as in BERT; a word with a rarer one becomes [UNK]
WORD_CACHE_BYTES = 64_000_000
MAX_TRAINING_WORD = 100  # characters; training time is quadratic in the longest word
WORD_OVERHEAD_BYTES = 250  # per cached word, besides its letters

# A run of ASCII is a word only if no other character follows. Whether that one would belong to the
# word depends on the tokenizer's Unicode tables, so it gets everything up to the next space.
_ALONE = r"(?![^ -~\t\n\r])"
_PUNCTUATION = r"!-/:-@\[-`{-~"
# Unicode White_Space. Python's \s adds four separators, which the tokenizer treats as letters.
_SPACE = r" \t\n\x0b\x0c\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# GPT-2's pattern, the most common case first.
_BPE_WORD = re.compile(
    rf" ?[A-Za-z]++{_ALONE}|'(?:[stmd]|re|ve|ll)| ?[{_PUNCTUATION}]++{_ALONE}| ?[0-9]++{_ALONE}"
    rf"| ?[^{_SPACE}]++|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)
_WORDPIECE_WORD = re.compile(rf"[A-Za-z0-9]++{_ALONE}|[{_PUNCTUATION}]|[^ \t\n\r]+")


def token_dtype(vocab_size: int) -> TokenType:
    """Returns the smallest integer type that holds every id."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def build_tokenizer(texts: Sequence[str], *, kind: TokenizerKind, vocab_size: int) -> Tokenizer:
    """Trains a tokenizer; equal texts give equal tokenizers, byte for byte.

    The vocabulary is smaller than `vocab_size` if the text is too small to fill it.

    Raises:
        ValueError: the special tokens and the alphabet alone exceed `vocab_size`.
    """
    build = _build_bpe if kind == "bpe" else _build_wordpiece
    tokenizer = build(texts, max(vocab_size, 0))  # the trainers overflow on negative sizes
    # The trainers never go below the special tokens and the alphabet.
    if (minimum := tokenizer.get_vocab_size()) > vocab_size:
        raise ValueError(
            f"model.num-classes {vocab_size} is too small a vocabulary: the special tokens and the "
            f"alphabet of this text take {minimum} entries with {kind}; give at least {minimum}"
        )
    return tokenizer


def _build_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS["bpe"]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # prints to stdout otherwise
    )
    _train(tokenizer, texts, trainer)
    return tokenizer


def _build_wordpiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    characters = _count_characters(texts)
    # By default the trainer numbers the "##" characters (and chooses among equally rare ones) in
    # the order of a randomly seeded hash table and breaks ties between merges by those numbers:
    # every run gives a different vocabulary. Special tokens are numbered in the order given.
    alphabet = [*characters, *(f"##{c}" for c in characters if _continues_word(c))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS["wordpiece"], *alphabet],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,  # prints to stdout otherwise
    )
    trained = _wordpiece_tokenizer({})
    _train(trained, texts, trainer)
    # A new tokenizer, as the trained one treats every letter of the alphabet as a special token.
    tokenizer = _wordpiece_tokenizer(trained.get_vocab())
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS["wordpiece"]))
    return tokenizer


def _train(tokenizer: Tokenizer, texts: Sequence[str], trainer: trainers.Trainer) -> None:
    """Trains with long words split: a megabyte without a space would take hours."""
    words = tokenizer.pre_tokenizer
    split = pre_tokenizers.FixedLength(length=MAX_TRAINING_WORD)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, split])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words


def _wordpiece_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _count_characters(texts: Sequence[str]) -> list[str]:
    """Returns the most common characters of the normalized texts, in order of code point."""
    normalizer = normalizers.BertNormalizer(lowercase=False)
    counts = Counter(chain.from_iterable(normalizer.normalize_str(text) for text in texts))
    del counts[" "]
    return sorted(sorted(counts, key=lambda c: (-counts[c], c))[:NUM_CHARACTERS])


def _continues_word(character: str) -> bool:
    """Whether a letter and this character form one word; punctuation and Chinese do not."""
    text = normalizers.BertNormalizer(lowercase=False).normalize_str(f"a{character}")
    return len(pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)) == 1


class Encoder:
    """Encodes text as the bytes of the token ids that `tokenizer.encode` gives, only faster.

    The tokenizer encodes each distinct word once; a dictionary caches the result. Special tokens
    spelled out in the text stay text, so a document cannot fake its end.
    """

    def __init__(self, tokenizer: Tokenizer, *, kind: TokenizerKind) -> None:
        self.dtype = token_dtype(tokenizer.get_vocab_size())
        separator = "<|endoftext|>" if kind == "bpe" else "[SEP]"  # between two documents
        self.separator = self._to_bytes([SPECIAL_TOKENS[kind].index(separator)])
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._find_words = (_BPE_WORD if kind == "bpe" else _WORDPIECE_WORD).findall
        self._ids: dict[str, bytes] = {}
        self._num_bytes = 0

    def encode(self, text: str) -> bytes:
        """Returns the ids of `text`, of type `self.dtype`, without a separator."""
        words = self._find_words(text)
        if self._num_bytes > WORD_CACHE_BYTES:
            self._ids, self._num_bytes = {}, 0
        new = list(set(words).difference(self._ids))
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        for word, encoding in zip(new, encodings, strict=True):
            self._ids[word] = self._to_bytes(encoding.ids)
        self._num_bytes += sum(map(len, new)) + WORD_OVERHEAD_BYTES * len(new)
        return b"".join(map(self._ids.__getitem__, words))

    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()
