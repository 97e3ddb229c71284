#!/usr/bin/env bash
# torch 2.13.0: `item()` of a sum, norm or count of a sharded DTensor is that of the rank's own rows, without a
# message: under FSDP2 `weight.grad.norm().item()` differs between ranks and is too small. `bool(...)` and
# `float(...)` do the same; `full_tensor().item()` is right, as is `item()` of a variance, which torch gathers for.
# In 2.14.1 `any` is right as well; sums, norms and counts are as here.
# Expected: the value of the whole tensor, or an error, as from `tolist()`.
# Seen:
#   of 0, 1, 2, 3, 4 on rank 0: sum 3, whole 10; nonzero 2, whole 4; any is 4: False, whole True; variance 2.5
#   norm of a gradient on rank 0: 11.31, whole 16.00; tolist(): RuntimeError
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
numbers = torch.arange(5.0)
sharded = distribute_tensor(numbers, mesh, [Shard(0)])  # 0, 1, 2 on rank 0
layer = nn.Linear(8, 8, bias=False)
fully_shard(layer, mesh=mesh)
layer(torch.ones(2, 8)).sum().backward()
grad = layer.weight.grad
own, whole = grad.norm().item(), grad.norm().full_tensor().item()
found = [sharded.sum().item(), sharded.count_nonzero().item(), bool((sharded == 4).any())]
total = [numbers.sum().item(), numbers.count_nonzero().item(), bool((numbers == 4).any())]
variance = sharded.var().item()
try:
    grad.tolist()
    error = None
except RuntimeError as raised:
    error = type(raised).__name__
if dist.get_rank() == 0:
    print(f"of 0, 1, 2, 3, 4 on rank 0: sum {found[0]:.0f}, whole {total[0]:.0f};", end=" ")
    print(f"nonzero {found[1]}, whole {total[1]}; any is 4: {found[2]}, whole {total[2]}; variance {variance}")
    print(f"norm of a gradient on rank 0: {own:.2f}, whole {whole:.2f}; tolist(): {error}")
    assert found == [3, 2, False] and total == [10, 4, True], "changed"
assert own < 0.8 * whole and variance == 2.5 and error == "RuntimeError", "changed"
dist.destroy_process_group()
PY
timeout 120 "$folder/venv/bin/torchrun" --nproc-per-node 2 --standalone check.py 2>errors.txt || { tail -n 5 errors.txt; exit 1; }
