#!/usr/bin/env bash
# torch 2.13.0: building any optimizer imports the compiler (`torch._dynamo`, and sympy), and `Module.to_empty` from the
# meta device imports sympy, in a program that never compiles. Building SGD for one layer takes longer than a
# hundred steps of it.
# Expected: the compiler is imported when something is compiled.
# Seen:
#   modules after import torch: 1,114, of sympy 0, of torch._dynamo 0
#   modules after to_empty:     1,602, of sympy 419, of torch._dynamo 0
#   modules after SGD(...):     1,937, of sympy 419, of torch._dynamo 93
#   SGD(...) took 2.9 s of the processor, 80 times as long as 100 steps
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import sys
import time

import torch
from torch import nn


def count(name):
    return sum(module == name or module.startswith(f"{name}.") for module in sys.modules)


def show(when):
    counts = count("sympy"), count("torch._dynamo")
    print(f"modules after {when:<13} {len(sys.modules):,}, of sympy {counts[0]}, of torch._dynamo {counts[1]}")
    return counts


imported = show("import torch:")
with torch.device("meta"):
    layer = nn.Linear(4, 4)
layer.to_empty(device="cpu")
emptied = show("to_empty:")
nn.init.zeros_(layer.weight)
nn.init.zeros_(layer.bias)
started_s = time.process_time()
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
built_s = time.process_time() - started_s
built = show("SGD(...):")
started_s = time.process_time()
for _ in range(100):
    optimizer.zero_grad()
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
steps_s = time.process_time() - started_s
print(f"SGD(...) took {built_s:.1f} s of the processor, {built_s / steps_s:.0f} times as long as 100 steps")
assert imported == (0, 0), "changed"
assert emptied[0] > 0 and emptied[1] == 0, "changed"
assert built[1] > 0, "changed"
assert built_s > steps_s, "changed"
PY
"$python" check.py
