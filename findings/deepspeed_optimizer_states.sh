#!/usr/bin/env bash
# deepspeed 0.19.8: with ZeRO stage 1 or 2, the documented `safe_get_full_optimizer_state` finds the states of the
# first parameter group only: the states are linked to parameters when the first group has stepped, and those
# of the other groups do not exist by then. Stage 3 finds all.
# Expected: the states of every parameter, as with stage 3.
# Seen:
#   stage 1: group 0 has exp_avg; group 1: ValueError: exp_avg not found in optimizer state fragment
#   stage 2: group 0 has exp_avg; group 1: ValueError: exp_avg not found in optimizer state fragment
#   stage 3: group 0 has exp_avg; group 1 has exp_avg
. "$(dirname "$0")/common.sh"
install_deepspeed torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8
cat > check.py <<'PY'
import os
import sys
import torch

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import deepspeed.ops
from deepspeed.utils import safe_get_full_optimizer_state

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built in C++ for several processes
stage = int(sys.argv[1])
deepspeed.init_distributed("gloo")
model = torch.nn.Linear(4, 4)
groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
config = {
    "train_micro_batch_size_per_gpu": 2, "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": stage},
}
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.AdamW(groups), config=config, dist_init_required=False
)
for _ in range(3):
    engine.backward(engine(torch.ones(2, 4)).square().sum())
    engine.step()
found = []
for number, parameter in enumerate((model.weight, model.bias)):
    try:
        assert safe_get_full_optimizer_state(parameter, "exp_avg").abs().sum() > 0
        found.append(f"group {number} has exp_avg")
    except ValueError as error:
        found.append(f"group {number}: ValueError: {error}")
print(f"stage {stage}: {'; '.join(found)}", flush=True)
assert found[0] == "group 0 has exp_avg" and ("ValueError" in found[1]) == (stage < 3), "changed"
PY
for stage in 1 2 3; do run_deepspeed check.py $stage; done
