#!/usr/bin/env bash
# tokenizers 0.23.3: a trainer whose `vocab_size` is smaller than the alphabet makes a larger vocabulary, without a
# message. A model with an embedding of the size that was asked for then gets indices beyond its end.
# Expected: an error, or no more tokens than `vocab_size`, which the manual calls the size of the final vocabulary.
# Seen:
#   BPE over bytes, vocab_size 100: 256 tokens, largest index 255
#   WordPiece, vocab_size 30: 46 tokens, largest index 45
. "$(dirname "$0")/common.sh"
install tokenizers==0.23.3
cat > check.py <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

text = ["the quick brown fox jumps over the lazy dog"] * 50
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=100, initial_alphabet=alphabet, show_progress=False))
word_piece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
word_piece.pre_tokenizer = pre_tokenizers.Whitespace()
trainer = trainers.WordPieceTrainer(vocab_size=30, special_tokens=["[UNK]"], show_progress=False)
word_piece.train_from_iterator(text, trainer)
for name, asked, tokenizer in (("BPE over bytes", 100, bpe), ("WordPiece", 30, word_piece)):
    size, largest = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values())
    print(f"{name}, vocab_size {asked}: {size} tokens, largest index {largest}")
    assert largest >= asked, "changed"
PY
"$python" check.py
