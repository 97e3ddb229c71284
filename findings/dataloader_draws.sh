#!/usr/bin/env bash
# torch 2.13.0: each pass over a DataLoader draws a random number, as a seed for workers, also where it has no workers
# and does not shuffle. A run that validates between epochs therefore trains in another order and with other dropout
# than one that does not. A loader with a `generator` of its own leaves other random numbers alone.
# Expected: no random number where nothing is random.
# Seen:
#   first random number after seed 0: 0.4963, after a pass over an unshuffled loader: 0.0885, with a generator: 0.4963
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch
from torch.utils.data import DataLoader


def draw(*loaders):
    torch.manual_seed(0)
    for loader in loaders:
        list(loader)
    return round(torch.rand(1).item(), 4)


plain, generated = DataLoader(range(4)), DataLoader(range(4), generator=torch.Generator())
numbers = draw(), draw(plain), draw(generated)
print("first random number after seed 0: {}, after a pass over an unshuffled loader: {}, with a generator: {}".format(*numbers))
assert numbers[0] == numbers[2] != numbers[1], "changed"
PY
"$python" check.py
