#!/usr/bin/env bash
# torch 2.13.0: on a CPU, FlopCounterMode counts no FLOPs for scaled_dot_product_attention, in the
# forward and the backward pass (https://github.com/pytorch/pytorch/issues/195460). On the meta device
# it counts them.
# Expected: the same number on every device.
# Seen:
#   attention forward and backward, by device: {'meta': 1572864, 'cpu': 0}
#   formula: 1572864
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode


def count(device):
    q, k, v = (torch.randn(1, 2, 64, 16, device=device, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(q, k, v).sum().backward()
    return counter.get_total_flops()


counted = {device: count(device) for device in ("meta", "cpu")}
print("attention forward and backward, by device:", counted)
print("formula:", formula := 3 * 2 * (2 * 2 * 64 * 64 * 16))
assert counted == {"meta": formula, "cpu": 0}, "changed"
PY
"$python" check.py
