#!/usr/bin/env bash
# torch 2.13.0: gloo adds bfloat16 numbers in bfloat16, so the sum over ranks depends on which rank holds
# the large value: 256 + 1 + 1 + 1 over four ranks is 256 or 260.
# Expected: the same sum for any order of the ranks, for example from partial sums in float32.
# Seen:
#   sum of 256, 1, 1, 1 by the rank that holds 256: [260.0, 260.0, 256.0, 256.0]
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch, torch.distributed as dist

dist.init_process_group("gloo")
sums = []
for large in range(dist.get_world_size()):
    value = torch.tensor([256.0 if dist.get_rank() == large else 1.0], dtype=torch.bfloat16)
    dist.all_reduce(value)
    sums.append(value.item())
if dist.get_rank() == 0:
    print("sum of 256, 1, 1, 1 by the rank that holds 256:", sums)
dist.destroy_process_group()
assert len(set(sums)) > 1, "changed"
PY
timeout 120 "$folder/venv/bin/torchrun" --nproc-per-node 4 --standalone check.py 2>/dev/null
