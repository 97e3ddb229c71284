#!/usr/bin/env bash
# torch 2.13.0: `to_empty` makes two tensors of a parameter that two modules share. A language model whose
# head shares the embedding, built on the meta device, then trains two matrices, without a message.
# Expected: tied parameters stay tied, as `to` keeps them.
# Seen:
#   parameters when built, after to, after to_empty: [1, 1, 2]
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch
from torch import nn


def build(device):
    with torch.device(device):
        network = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    network["head"].weight = network["embedding"].weight
    return network


counts = [
    len(list(network.parameters()))
    for network in (build("cpu"), build("cpu").to(torch.float64), build("meta").to_empty(device="cpu"))
]
print("parameters when built, after to, after to_empty:", counts)
assert counts == [1, 1, 2], "changed"
PY
"$python" check.py
