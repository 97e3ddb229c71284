#!/usr/bin/env bash
# lightning 2.6.6: a run that resumes from the checkpoint at the end of an epoch, up to a number of steps, first trains
# on the epoch's first batch once more, as a batch with the number 4 of an epoch of 4 batches. All later batches come
# one step late. Up to a number of epochs it resumes as expected. https://github.com/Lightning-AI/pytorch-lightning/issues/19617
# Expected: the batches of the run that was not interrupted.
# Seen:
#   (epoch, number of the batch, value in the batch)
#   uninterrupted, from step 5: [(1, 0, 10), (1, 1, 11), (1, 2, 12), (1, 3, 13)]
#   resumed with max_epochs=2:  [(1, 0, 10), (1, 1, 11), (1, 2, 12), (1, 3, 13)]
#   resumed with max_steps=8:   [(0, 4, 10), (1, 0, 10), (1, 1, 11), (1, 2, 12)]
. "$(dirname "$0")/common.sh"
install torch==2.13.0 lightning==2.6.6 numpy==2.4.6 setuptools==80.9.0
cat > check.py <<'PY'
import torch
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, number):
        self.seen.append((self.trainer.current_epoch, number, int(batch)))
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def seen(checkpoint=None, **limit):
    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint("kept", filename="{epoch}", save_top_k=-1, every_n_epochs=1)], **limit,
    )
    loader = DataLoader(torch.arange(10.0, 14.0).reshape(4, 1), batch_size=1)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return module.seen


whole = seen(max_steps=8)[4:]
epochs = seen("kept/epoch=0.ckpt", max_epochs=2)
steps = seen("kept/epoch=0.ckpt", max_steps=8)
print("(epoch, number of the batch, value in the batch)")
print("uninterrupted, from step 5:", whole)
print("resumed with max_epochs=2: ", epochs)
print("resumed with max_steps=8:  ", steps)
assert epochs == whole == [(1, 0, 10), (1, 1, 11), (1, 2, 12), (1, 3, 13)], "changed"
assert steps == [(0, 4, 10), (1, 0, 10), (1, 1, 11), (1, 2, 12)], "changed"
PY
timeout 120 "$python" check.py 2>/dev/null
