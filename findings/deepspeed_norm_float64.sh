#!/usr/bin/env bash
# deepspeed 0.19.8: before a step, ZeRO copies each gradient of its share to float64 for the norm of the gradients,
# also where clipping is off and the gradients are in bfloat16: four times the bytes of the largest one for a while.
# Expected: a norm that reads the gradients as they are and adds up in float32 or more, as `torch.nn.utils`'s does.
# Seen:
#   stage 1: float64 copy of 8,000,000 bytes, of a gradient of 2,000,000 in bfloat16
#   stage 2: float64 copy of 8,000,000 bytes, of a gradient of 2,000,000 in bfloat16
#   stage 3: float64 copy of 8,000,000 bytes, of a gradient of 2,000,000 in bfloat16
#   torch.nn.utils.get_total_norm: no copy
. "$(dirname "$0")/common.sh"
install_deepspeed torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8
cat > check.py <<'PY'
import os
import sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import deepspeed.ops


class Copies(TorchDispatchMode):
    """Keeps the largest copy to float64, and what it was made of."""

    found = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "_to_copy" in str(func) and result.dtype == torch.float64:
            if self.found is None or result.nbytes > self.found[1].nbytes:
                self.found = args[0], result
        return result


stage = int(sys.argv[1])
model = torch.nn.Linear(1000, 1000, bias=False)
if stage == 0:
    model(torch.ones(2, 1000)).sum().backward()
    with Copies() as copies:
        torch.nn.utils.get_total_norm([model.weight.grad.bfloat16()])
    print("torch.nn.utils.get_total_norm:", "no copy" if copies.found is None else "a copy", flush=True)
    sys.exit(copies.found is not None)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built in C++ for several processes
deepspeed.init_distributed("gloo")
config = {
    "train_micro_batch_size_per_gpu": 2, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": True},
    "gradient_clipping": 0.0, "zero_optimization": {"stage": stage},
}
optimizer = torch.optim.AdamW(model.parameters())
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
with Copies() as copies:
    engine.backward(engine(torch.ones(2, 1000, dtype=torch.bfloat16)).float().square().sum())
    engine.step()
gradient, copy = copies.found
dtype = str(gradient.dtype).removeprefix("torch.")
print(f"stage {stage}: float64 copy of {copy.nbytes:,} bytes, of a gradient of {gradient.nbytes:,} in {dtype}", flush=True)
assert copy.numel() == 1_000_000 and gradient.dtype == torch.bfloat16, "changed"
PY
for stage in 1 2 3; do run_deepspeed check.py $stage; done
run_deepspeed check.py 0
