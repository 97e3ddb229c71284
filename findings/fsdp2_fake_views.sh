#!/usr/bin/env bash
# torch 2.13.0: on fake tensors `fully_shard` makes views for every rank of the mesh, for each parameter, although
# each rank keeps one shard. The work to prepare one rank of a large job grows with the number of ranks; on
# meta tensors it does not.
# Expected: as many operations on fake tensors as on meta tensors.
# Seen:
#   ranks    operations of fully_shard on 4 parameters: fake, meta
#       8           157         33
#      64           829         33
#     512         6,205         33
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import contextlib

import torch, torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def count_operations(ranks, mode, device):
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    with mode, torch.device(device):
        network = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))
    with mode, Count() as count:
        fully_shard(network, mesh=mesh)
    dist.destroy_process_group()
    return count.operations


print("ranks    operations of fully_shard on 4 parameters: fake, meta")
fake, meta = [], []
for ranks in (8, 64, 512):
    fake.append(count_operations(ranks, FakeTensorMode(), "cpu"))
    meta.append(count_operations(ranks, contextlib.nullcontext(), "meta"))
    print(f"{ranks:>5} {fake[-1]:>13,} {meta[-1]:>10,}")
assert meta[0] == meta[1] == meta[2], "changed"
# At least one view for each parameter and each further rank.
assert fake[2] - fake[1] >= 4 * (512 - 64), "changed"
PY
"$python" check.py
