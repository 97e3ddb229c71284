#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: the loss of causal language models raises an error for logits or shifted labels
# that are not contiguous, such as those of a network with the sequence first.
# Expected: the same loss for equal values in any layout, as `torch.nn.functional.cross_entropy` gives.
# Seen:
#   contiguous: 2.2601
#   logits of a transposed tensor: RuntimeError: view size is not compatible with input tensor's size and stride
#   shifted labels of a transposed tensor: RuntimeError: view size is not compatible with input tensor's size and stride
#   cross_entropy of torch, same logits: 2.2601
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cat > check.py <<'PY'
import torch
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

torch.manual_seed(0)
sequence_first = torch.randn(6, 2, 10)  # positions, samples, classes
logits = sequence_first.transpose(0, 1)
labels = torch.randint(10, (2, 6))
shifted = torch.randint(10, (6, 2)).T


def loss_of(**arguments):
    try:
        return f"{ForCausalLMLoss(vocab_size=10, **arguments).item():.4f}"
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).split(' (')[0]}"


rows = {
    "contiguous": loss_of(logits=logits.contiguous(), labels=labels),
    "logits of a transposed tensor": loss_of(logits=logits, labels=labels),
    "shifted labels of a transposed tensor": loss_of(
        logits=logits.contiguous(), labels=None, shift_labels=shifted
    ),
    "cross_entropy of torch, same logits": f"{functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item():.4f}",
}
for name, text in rows.items():
    print(f"{name}: {text}")
values = list(rows.values())
assert values[0] == values[3], "changed"
assert all(value.startswith("RuntimeError: view size is not compatible") for value in values[1:3]), "changed"
PY
"$python" check.py
