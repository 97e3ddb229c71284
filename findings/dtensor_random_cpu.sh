#!/usr/bin/env bash
# torch 2.13.0: on CPUs each rank draws the numbers of its part of a DTensor itself. With the same seed on all ranks
# the parts are copies: after `fully_shard` on two ranks, `reset_parameters` gives a weight whose lower half equals
# its upper half. The warning says "may not have complete support on cpu device mesh", not that numbers repeat.
# Expected: the numbers of the unsharded tensor, or an error.
# Seen:
#   weight of a linear layer, drawn before fully_shard: halves are equal: False
#   weight of a linear layer, drawn after fully_shard: halves are equal: True
#   singular values above 1e-6, of 8: 8 and 4
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
layer = nn.Linear(8, 8, bias=False)
fully_shard(layer, mesh=mesh)
weights = [layer.weight.full_tensor().detach()]
torch.manual_seed(0)
layer.reset_parameters()
weights.append(layer.weight.full_tensor().detach())
equal = [torch.equal(weight[:4], weight[4:]) for weight in weights]
ranks = [int((torch.linalg.svdvals(weight) > 1e-6).sum()) for weight in weights]
if dist.get_rank() == 0:
    for when, is_equal in zip(("before", "after"), equal):
        print(f"weight of a linear layer, drawn {when} fully_shard: halves are equal: {is_equal}")
    print(f"singular values above 1e-6, of 8: {ranks[0]} and {ranks[1]}")
assert equal == [False, True] and ranks == [8, 4], "changed"
dist.destroy_process_group()
PY
timeout 120 "$folder/venv/bin/torchrun" --nproc-per-node 2 --standalone check.py 2>errors.txt || { tail -n 5 errors.txt; exit 1; }
