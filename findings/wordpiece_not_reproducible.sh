#!/usr/bin/env bash
# tokenizers 0.23.3: training a WordPiece vocabulary on the same text gives other tokens, or another
# order of them, in another process; nothing can be seeded.
# Expected: the same vocabulary from the same text.
# Seen:
#         1 184c3771fd5d4c07
#         1 1db8332920af3afd
#         1 434b9a808ce05f5b
#         2 54c0b631bdb09a05
#   vocabularies from five runs: 4
. "$(dirname "$0")/common.sh"
install tokenizers==0.23.3
cat > check.py <<'PY'
import hashlib, json, pathlib, re
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import argparse, inspect, typing

text = [line for module in (argparse, inspect, typing, re) for line in inspect.getsource(module).splitlines()]
tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=["[UNK]"], show_progress=False)
tokenizer.train_from_iterator(text, trainer)
vocabulary = json.dumps(sorted(tokenizer.get_vocab()))
print(hashlib.sha256(vocabulary.encode()).hexdigest()[:16])
PY
for _ in 1 2 3 4 5; do "$python" check.py; done | sort | uniq -c | tee out.txt
echo "vocabularies from five runs: $(wc -l <out.txt)"
test "$(wc -l <out.txt)" -gt 1
