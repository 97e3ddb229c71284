#!/usr/bin/env bash
# tokenizers 0.23.3: `enable_truncation(max_length)` below the number of special tokens that are added truncates
# nothing, without a message: with [CLS] and [SEP], a length of 1 gives all 7 tokens, and a length of 2 gives 2.
# Expected: an error from `enable_truncation` or `encode`, as from `enable_truncation` with a stride that is too long.
# Seen:
#   max_length 3: [CLS] a [SEP]
#   max_length 2: [CLS] [SEP]
#   max_length 1: [CLS] a a a a a [SEP]
. "$(dirname "$0")/common.sh"
install tokenizers==0.23.3
cat > check.py <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers, processors

tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
)
lengths = {}
for length in (3, 2, 1):
    tokenizer.enable_truncation(length)
    tokens = tokenizer.encode("a a a a a").tokens
    lengths[length] = len(tokens)
    print(f"max_length {length}:", *tokens)
assert lengths == {3: 3, 2: 2, 1: 7}, "changed"
PY
"$python" check.py
