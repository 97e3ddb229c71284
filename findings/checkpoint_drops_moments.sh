#!/usr/bin/env bash
# torch 2.13.0: `torch.distributed.checkpoint.load` into the state dict of a new AdamW restores lr and betas and
# leaves out the moments, without a message: it reads only what the given dict names, and a new optimizer has no
# state yet. Training then goes on as if the moments were zero. A missing key the other way round is an error.
# Expected: the moments, or an error that names what is in the checkpoint and was not read.
# Seen:
#   saved: lr 0.3, moments of 2 parameters; loaded: lr 0.3, moments of 0 parameters
#   with torch.save and torch.load: lr 0.3, moments of 2 parameters
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch
import torch.distributed.checkpoint as dcp
from torch import nn


def build(lr):
    layer = nn.Linear(2, 2)
    return layer, torch.optim.AdamW(layer.parameters(), lr=lr)


def describe(optimizer):
    return f"lr {optimizer.param_groups[0]['lr']}, moments of {len(optimizer.state)} parameters"


layer, optimizer = build(0.3)
for _ in range(3):
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id="checkpoint")
torch.save(optimizer.state_dict(), "optimizer.pt")

_, resumed = build(0.1)
state = {"optimizer": resumed.state_dict()}
dcp.load(state, checkpoint_id="checkpoint")
resumed.load_state_dict(state["optimizer"])
_, other = build(0.1)
other.load_state_dict(torch.load("optimizer.pt"))
print(f"saved: {describe(optimizer)}; loaded: {describe(resumed)}")
print(f"with torch.save and torch.load: {describe(other)}")
assert len(optimizer.state) == len(other.state) == 2 and len(resumed.state) == 0, "changed"
assert resumed.param_groups[0]["lr"] == 0.3, "changed"
PY
timeout 120 "$python" check.py 2>errors.txt || { tail -n 5 errors.txt; exit 1; }
