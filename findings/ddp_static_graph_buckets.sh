#!/usr/bin/env bash
# torch 2.13.0: DistributedDataParallel(static_graph=True) reduces all gradients as one bucket in the
# first TWO steps, so that nothing overlaps with the backward pass; buckets begin with the third.
# Without a static graph this is so in the first step only.
# Expected: buckets from the second step on, as the log line on rebuilt buckets suggests.
# Seen:
#   buckets per step, static graph: [1, 1, 9, 9, 9]
#   buckets per step, otherwise:    [1, 9, 9, 9, 9]
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import os
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def count_buckets(static_graph):
    network = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(16)))  # 256 MiB of gradients
    ddp = nn.parallel.DistributedDataParallel(network, static_graph=static_graph)
    buckets = []

    def hook(state, bucket):
        buckets[-1] += 1
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, hook)
    for _ in range(5):
        buckets.append(0)
        ddp(torch.randn(1, 2048)).sum().backward()
    return buckets


print("buckets per step, static graph:", static := count_buckets(True))
print("buckets per step, otherwise:   ", plain := count_buckets(False))
dist.destroy_process_group()
assert static[:2] == [1, 1] and min(static[2:]) > 1, "changed"
assert plain[:1] == [1] and min(plain[1:]) > 1, "changed"
PY
"$python" check.py
