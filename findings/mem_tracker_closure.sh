#!/usr/bin/env bash
# torch 2.13.0: `MemTracker` files everything that a step allocates under optimizer state when the forward and
# backward pass run in the closure of `optimizer.step(closure)`, as Lightning's automatic optimization does.
# Only the total stays right.
# Expected: activations, gradients and temporaries as without a closure.
# Seen:
#   peak bytes             without a closure    in a closure
#   Activation                     1,048,584               0
#   Temp                           1,311,744               0
#   Optstate                       2,105,376       4,465,704
#   Total                          5,781,544       5,781,544
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker


def peak_of_two_steps(is_closure):
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    optimizer = torch.optim.Adam(network.parameters(), foreach=False)
    batch = torch.rand(512, 256)

    def compute():
        optimizer.zero_grad()
        loss = network(batch).sum()
        loss.backward()
        return loss

    tracker = MemTracker()
    tracker.track_external(network, optimizer)
    with tracker:
        for step in range(2):
            if is_closure:
                optimizer.step(compute)
            else:
                compute()
                optimizer.step()
            if step == 0:
                tracker.reset_mod_stats()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {getattr(kind, "value", kind): count for kind, count in snapshot.items()}


plain, closure = peak_of_two_steps(False), peak_of_two_steps(True)
print("peak bytes             without a closure    in a closure")
for kind in ("Activation", "Temp", "Optstate", "Total"):
    print(f"{kind:<18} {plain[kind]:>21,} {closure[kind]:>15,}")
assert plain["Activation"] > 0 and plain["Temp"] > 0, "changed"
assert closure["Activation"] == closure["Temp"] == 0, "changed"
assert closure["Total"] == plain["Total"], "changed"
moved = plain["Activation"] + plain["Temp"]
assert closure["Optstate"] == plain["Optstate"] + moved, "changed"
PY
"$python" check.py
