#!/usr/bin/env bash
# torch 2.13.0: autocast keeps the casted copy of a weight until its region ends, also after the weight has changed.
# A training loop that is wholly inside one region computes every step with the first weights, without a message,
# while the weights and the moments of the optimizer go on changing.
# Expected: a new copy when the weight has another version, which torch counts, or an error.
# Seen:
#   losses, a region per step: 2.66 2.16 1.98 1.89 1.83
#   losses, one region:        2.66 2.66 2.66 2.66 2.66; the weights have changed: True
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch
from torch import nn


def train(num_regions, steps_per_region):
    torch.manual_seed(0)
    layer, losses = nn.Linear(4, 1), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    first = layer.weight.detach().clone()
    for _ in range(num_regions):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(steps_per_region):
                loss = ((layer(x) - y) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    return losses, not torch.equal(first, layer.weight)


(many, _), (one, is_changed) = train(5, 1), train(1, 5)
print("losses, a region per step:", *(f"{loss:.2f}" for loss in many))
print("losses, one region:       ", *(f"{loss:.2f}" for loss in one), end=f"; the weights have changed: {is_changed}\n")
assert len(set(many)) == 5 and len(set(one)) == 1 and is_changed, "changed"
PY
"$python" check.py
