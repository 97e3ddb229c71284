#!/usr/bin/env bash
# lightning 2.6.6 with deepspeed 0.19.8: with accumulate_grad_batches=N gradients are N times too small.
# Lightning divides the loss of each batch by N, and gives N to DeepSpeed, which divides by it again. AdamW
# hides the factor in the loss; clipping and SGD do not. (Lightning refuses DeepSpeed on a CPU: the subclass below
# skips this check alone.)
# Expected: the same gradient as without DeepSpeed.
# Seen:
#   plain     accumulate 1: the weight moves by 1.00
#   plain     accumulate 4: the weight moves by 1.00
#   deepspeed accumulate 1: the weight moves by 1.00
#   deepspeed accumulate 4: the weight moves by 0.25
. "$(dirname "$0")/common.sh"
install_deepspeed torch==2.13.0 lightning==2.6.6 numpy==2.4.6 deepspeed==0.19.8
cat > check.py <<'PY'
import argparse
import os
import sys
import torch

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import deepspeed.ops
import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch.utils.data import DataLoader

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built in C++ for several processes


class OnCPU(DeepSpeedStrategy):
    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        engine, optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=0), config=self.config, model=model, optimizer=optimizer,
            lr_scheduler=lr_scheduler, model_parameters=list(model.parameters()), dist_init_required=False,
        )
        return engine, optimizer


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def training_step(self, batch):
        return (self.weight[0] * batch).mean()  # its gradient is 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


name, accumulate = sys.argv[1], int(sys.argv[2])
module = Module()
trainer = pl.Trainer(
    accelerator="cpu", devices=1, strategy=OnCPU(stage=2) if name == "deepspeed" else "auto", max_epochs=1,
    accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, DataLoader(torch.ones(4, 1), batch_size=4 // accumulate))
moved = module.weight[0].abs().item()
print(f"{name:9} accumulate {accumulate}: the weight moves by {moved:.2f}", flush=True)
assert trainer.global_step == 1, trainer.global_step
assert abs(moved - (1 / accumulate if name == "deepspeed" else 1)) < 1e-6, "changed"
PY
for name in plain deepspeed; do
  for accumulate in 1 4; do run_deepspeed check.py $name $accumulate; done
done
