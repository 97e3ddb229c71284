#!/usr/bin/env bash
# torch 2.13.0: with `fully_shard` on each of L layers and on the root, a step gathers weights 2L + 1
# times: the root keeps its weights after the forward pass, although reshard_after_forward is left
# at its default. With reshard_after_forward=True on the root it is 2L + 2.
# Expected: one rule for all groups. It matters for counting bytes and for peak memory.
# Seen:
#   4 layers, gathers per step, default root:              [9, 9, 9]
#   4 layers, gathers per step, reshard_after_forward=True:  [10, 10, 10]
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

LAYERS = 4
torch.manual_seed(0)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))


def count_gathers(**root_options):
    network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(LAYERS)), nn.LayerNorm(8))
    for layer in network[:LAYERS]:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh, **root_options)
    counts = []
    for _ in range(3):
        with CommDebugMode() as mode:
            network(torch.randn(2, 8)).sum().backward()
        counts.append(sum(n for op, n in mode.get_comm_counts().items() if "allgather" in str(op)))
    return counts


default, resharded = count_gathers(), count_gathers(reshard_after_forward=True)
if dist.get_rank() == 0:
    print(f"{LAYERS} layers, gathers per step, default root:             ", default)
    print(f"{LAYERS} layers, gathers per step, reshard_after_forward=True: ", resharded)
dist.destroy_process_group()
assert default == [2 * LAYERS + 1] * 3, "changed"
assert resharded == [2 * LAYERS + 2] * 3, "changed"
PY
timeout 120 "$folder/venv/bin/torchrun" --nproc-per-node 2 --standalone check.py
