#!/usr/bin/env bash
# lightning 2.6.6: with several devices the Trainer replaces the sampler of the training data by a
# DistributedSampler that shuffles, although the loader was made with shuffle=False. On one device
# the order is kept.
# Expected: shuffle=False keeps the order on any number of devices.
# Seen:
#   1 devices, order of the samples: [0, 1, 2, 3, 4, 5, 6, 7]
#   2 devices, order of the samples: [4, 0, 7, 3, 2, 5, 1, 6]
. "$(dirname "$0")/common.sh"
install torch==2.13.0 lightning==2.6.6 numpy==2.4.6 setuptools==80.9.0
cat > check.py <<'PY'
import sys
import torch
import lightning.pytorch as pl
from torch.utils.data import DataLoader


class Module(pl.LightningModule):
    seen = []

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch):
        Module.seen += self.all_gather(batch.flatten()).flatten().long().tolist()
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


devices = int(sys.argv[1])
pl.seed_everything(0, verbose=False)
trainer = pl.Trainer(
    accelerator="cpu", devices=devices, strategy="auto" if devices == 1 else "ddp_fork", max_epochs=1,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)


class Report(pl.Callback):
    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            print(f"{devices} devices, order of the samples:", Module.seen, flush=True)
            assert (Module.seen == list(range(8))) == (devices == 1), "changed"


trainer.callbacks.append(Report())
loader = DataLoader(torch.arange(8.0).reshape(8, 1), batch_size=8 // devices // 4 or 1, shuffle=False)
trainer.fit(Module(), loader)
PY
timeout 120 "$python" check.py 1 2>/dev/null
timeout 120 "$python" check.py 2 2>/dev/null
