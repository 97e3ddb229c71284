#!/usr/bin/env bash
# deepspeed 0.19.8: with ZeRO stage 3 on several ranks, weights that are gathered ahead of their use are in memory
# twice: in the array that received them, and as a copy for each parameter. All copies are made when the first of
# these parameters is used, but the array is freed only when the last one is. With the default
# `stage3_prefetch_bucket_size` of 5e7 numbers that are up to 200 MB in float32 through most of a forward pass.
# The model below has four layers of 1 MiB; MiB that are gathered when each of them computes are printed.
# Expected: the array is freed when its parameters have been copied out of it.
# Seen:
#   prefetch bucket 50000000: 8 8 8 4
#   prefetch bucket 0: 1 2 3 4
. "$(dirname "$0")/common.sh"
install_deepspeed torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8
cat > check.py <<'PY'
import gc
import os
import sys
import torch

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import deepspeed.ops

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built in C++ for several processes
MIB = 2**20
EXPECTED = {50_000_000: [8, 8, 8, 4], 0: [1, 2, 3, 4]}


def large_mib():
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    blocks = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for size in blocks.values() if size >= MIB) / MIB


def be_rank(rank, prefetch):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    deepspeed.init_distributed("gloo")
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(4)))
    zero = {"stage": 3, "stage3_prefetch_bucket_size": prefetch, "reduce_bucket_size": 1024 * 1024}
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config, dist_init_required=False
    )
    seen = []
    for layer in model:
        layer.register_forward_pre_hook(lambda *_: seen.append(large_mib() - before))
    for _ in range(4):  # DeepSpeed learns the order of the layers from the first steps
        seen.clear()
        gc.collect()
        before = large_mib()
        engine.backward(engine(torch.ones(2, 512)).square().sum())
        engine.step()
    if rank == 0:
        print(f"prefetch bucket {prefetch}:", *(round(mib) for mib in seen), flush=True)
        assert [round(mib) for mib in seen] == EXPECTED[prefetch], f"changed: {seen}"


if __name__ == "__main__":
    torch.multiprocessing.spawn(be_rank, args=(int(sys.argv[1]),), nprocs=2)
PY
for prefetch in 50000000 0; do run_deepspeed check.py $prefetch; done
