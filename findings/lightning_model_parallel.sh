#!/usr/bin/env bash
# lightning 2.6.6: ModelParallelStrategy() without arguments sets data_parallel_size to the number of
# nodes. A model sharded with fully_shard over the mesh "data_parallel" is then sharded over one
# device: each of two devices holds all weights, without a message.
# Expected: sharding over all devices, or an error.
# Seen:
#   2 devices, default: a device holds 4096 of 4096 weights
#   2 devices, data_parallel_size=2: a device holds 2048 of 4096 weights
. "$(dirname "$0")/common.sh"
install torch==2.13.0 lightning==2.6.6 numpy==2.4.6 setuptools==80.9.0
cat > check.py <<'PY'
import torch
import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader


class Module(pl.LightningModule):
    def configure_model(self):
        self.layer = torch.nn.Linear(64, 64, bias=False)
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_end(self):
        local = self.layer.weight.to_local().numel()
        if self.global_rank == 0:
            print(f"2 devices, {NAME}: a device holds {local} of 4096 weights", flush=True)
        assert local == EXPECTED, "changed"


import sys

NAME = sys.argv[1]
OPTIONS, EXPECTED = {
    "default": ({}, 4096),
    "data_parallel_size=2": ({"data_parallel_size": 2, "tensor_parallel_size": 1}, 2048),
}[NAME]
pl.Trainer(
    accelerator="cpu", devices=2, strategy=ModelParallelStrategy(**OPTIONS), max_steps=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
).fit(Module(), DataLoader(torch.randn(4, 64), batch_size=2))
PY
for name in default data_parallel_size=2; do
  timeout 120 "$folder/venv/bin/torchrun" --nproc-per-node 2 --standalone check.py "$name" 2>/dev/null
done
