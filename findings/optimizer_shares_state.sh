#!/usr/bin/env bash
# torch 2.13.0: an optimizer that loads the state dict of another one shares its moments: a step of either changes
# both. `load_state_dict` of a module copies.
# Expected: a copy, as with modules.
# Seen:
#   steps counted by the second optimizer, which makes none: 1 before and 2 after a step of the first
#   moments are shared: True, weights of modules are shared: False
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch
from torch import nn

first, second = nn.Linear(2, 2), nn.Linear(2, 2)
optimizers = [torch.optim.AdamW(layer.parameters()) for layer in (first, second)]


def step():
    first(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()


step()
second.load_state_dict(first.state_dict())
optimizers[1].load_state_dict(optimizers[0].state_dict())
moments = [optimizer.state[layer.weight] for optimizer, layer in zip(optimizers, (first, second))]
before = int(moments[1]["step"])
step()
after = int(moments[1]["step"])
shares = [moments[0]["exp_avg"].data_ptr() == moments[1]["exp_avg"].data_ptr(),
          first.weight.data_ptr() == second.weight.data_ptr()]
print(f"steps counted by the second optimizer, which makes none: {before} before and {after} after a step of the first")
print(f"moments are shared: {shares[0]}, weights of modules are shared: {shares[1]}")
assert (before, after) == (1, 2) and shares == [True, False], "changed"
PY
"$python" check.py
