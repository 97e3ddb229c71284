#!/usr/bin/env bash
# torch 2.13.0: for a sample that is all padding, `nn.MultiheadAttention` returns NaN with need_weights=True and
# numbers without it, in training and in evaluation. Asking for the weights of attention changes the output.
# Expected: the same output, whether the weights are asked for or not.
# Seen:
#   output for a padded sample is NaN: with weights True, without False; for the other sample both agree: True
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch
from torch import nn

torch.manual_seed(0)
attention = nn.MultiheadAttention(4, 1, batch_first=True)
x, is_padding = torch.randn(2, 3, 4), torch.tensor([[False] * 3, [True] * 3])
for is_training in (True, False):
    attention.train(is_training)
    outputs = [attention(x, x, x, key_padding_mask=is_padding, need_weights=needs)[0] for needs in (True, False)]
    are_nan = [bool(output[1].isnan().all()) for output in outputs]
    is_same = torch.allclose(outputs[0][0], outputs[1][0])
    assert are_nan == [True, False] and is_same, "changed"
print(f"output for a padded sample is NaN: with weights {are_nan[0]}, without {are_nan[1]};",
      f"for the other sample both agree: {is_same}")
PY
"$python" check.py
