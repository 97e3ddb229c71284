#!/usr/bin/env bash
# torch 2.13.0: over gloo an all-gather into a tensor takes longer than an all-reduce of the same tensor, and a
# reduce-scatter of it nearly twice as long, although each sends half as many bytes: gloo gathers into arrays of its
# own, which are copied, and reduces whole copies of the tensor on every rank, of which one part is kept.
# Expected: about half of the time of the all-reduce, as with NCCL's rings. Times of other machines differ, their order does not.
# Seen:
#   64 MiB on 2 ranks, times of an all-reduce: all-gather 1.4, reduce-scatter 1.7
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import statistics
import time
import torch, torch.distributed as dist

torch.set_num_threads(1)
dist.init_process_group("gloo")
whole = torch.ones(2**24)
part = torch.ones(whole.numel() // dist.get_world_size())
collectives = {
    "all-reduce": lambda: dist.all_reduce(whole),
    "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
    "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
}
seconds = {name: [] for name in collectives}
for _ in range(15):
    for name, run in collectives.items():  # in turn, so that other work slows all alike
        whole.fill_(1.0)
        part.fill_(1.0)
        dist.barrier()
        start = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - start)
times = {name: statistics.median(of[3:]) for name, of in seconds.items()}
gather, scatter = times["all-gather"] / times["all-reduce"], times["reduce-scatter"] / times["all-reduce"]
if dist.get_rank() == 0:
    print(f"64 MiB on 2 ranks, times of an all-reduce: all-gather {gather:.1f}, reduce-scatter {scatter:.1f}", flush=True)
    assert gather > 0.75 and scatter > 1.25, "changed"
dist.destroy_process_group()
PY
timeout 120 "$folder/venv/bin/torchrun" --nproc-per-node 2 --standalone check.py 2>/dev/null
