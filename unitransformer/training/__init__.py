"""The LightningModule, the Trainer, and what a run keeps of its steps."""
