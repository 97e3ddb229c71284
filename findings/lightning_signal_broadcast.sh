#!/usr/bin/env bash
# lightning 2.6.6: with several devices the training loop broadcasts a tensor and waits for its value before
# every batch, also before those that only accumulate gradients, to ask whether a signal arrived. On a GPU
# this makes the host wait for the device once per batch. https://github.com/Lightning-AI/pytorch-lightning/issues/21487
# Expected: no collective of the loop's own in a batch that ends no optimizer step, or an option to switch it off.
# Seen:
#   1 devices, 8 batches, 2 optimizer steps: 0 broadcasts and 0 values read by the training loop
#   2 devices, 8 batches, 2 optimizer steps: 8 broadcasts and 8 values read by the training loop
. "$(dirname "$0")/common.sh"
install torch==2.13.0 lightning==2.6.6 numpy==2.4.6 setuptools==80.9.0
cat > check.py <<'PY'
import sys
import traceback
import torch
import lightning.pytorch as pl
from torch.utils.data import DataLoader

counts = {"broadcast": 0, "item": 0}
LOOP = "training_epoch_loop.py"


def counted(owner, name):
    """Counts the calls of a function that come straight from the file of the training loop."""
    original = getattr(owner, name)

    def call(*arguments, **options):
        counts[name] += traceback.extract_stack(limit=2)[0].filename.endswith(LOOP)
        return original(*arguments, **options)

    setattr(owner, name, call)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Report(pl.Callback):
    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            print(f"{devices} devices, 8 batches, {trainer.global_step} optimizer steps: {counts['broadcast']} broadcasts "
                  f"and {counts['item']} values read by the training loop", flush=True)
            assert trainer.global_step == 2, trainer.global_step
            assert list(counts.values()) == ([0, 0] if devices == 1 else [8, 8]), "changed"


devices = int(sys.argv[1])
counted(torch.distributed, "broadcast")
counted(torch.Tensor, "item")
trainer = pl.Trainer(
    accelerator="cpu", devices=devices, strategy="auto" if devices == 1 else "ddp_fork", max_epochs=1,
    accumulate_grad_batches=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[Report()],
)
trainer.fit(Module(), DataLoader(torch.ones(8 * devices, 1)))
PY
timeout 120 "$python" check.py 1 2>/dev/null
timeout 120 "$python" check.py 2 2>/dev/null
