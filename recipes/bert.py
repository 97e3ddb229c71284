"""Trains BERT to predict masked tokens: `python -m recipes.bert --devices 8`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.presets import Defaults, Preset
from unitransformer.config import ModelConfig

if TYPE_CHECKING:
    from unitransformer.run import RunOutcome


def _bert(num_layers: int, width: int, num_heads: int) -> ModelConfig:
    """Returns a BERT shape (Devlin et al. 2019, section 3), but pre-norm with a final norm."""
    return ModelConfig(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        feedforward_width=4 * width,
        num_classes=30_522,
        num_positions=512,
        dropout=0.1,
        activation="gelu",
        final_norm=True,
        tied_head=True,
    )


SIZES = {
    "reference": ModelConfig(
        width=128,
        num_layers=8,
        num_heads=8,
        feedforward_width=512,
        num_classes=40_000,
        num_positions=20,
        dropout=0.1,
    ),
    "base": _bert(12, 768, 12),
    "large": _bert(24, 1024, 16),
}

PRESET = Preset(
    recipe="bert",
    sizes=SIZES,
    cpu=Defaults(batch_size=64, max_steps=600, warmup_steps=50, learning_rate=2e-3),
    cuda=Defaults(
        batch_size=256,
        max_steps=10_000,
        warmup_steps=500,
        learning_rate=1e-3,
        precision="bf16-mixed",
        pad_vocabulary=128,
    ),
)
model_config = PRESET.model_config


def show(outcome: "RunOutcome", folder: Path) -> list[str]:
    """Fills the masked tokens of some validation sequences."""
    from recipes.showcase import fill_masks
    from unitransformer.data.datamodule import validation_batch
    from unitransformer.data.sampler import permutation

    source, network = outcome.data.source, outcome.network
    if source.corpus is None or network is None:
        return []
    shown = permutation(len(source.validation), 0, 0)[:3].tolist()
    batch = validation_batch(source.validation, shown, network.pe.pe.device)
    return ["", *fill_masks(network, source.corpus.tokenizer, batch), ""]


if __name__ == "__main__":
    from recipes.command_line import run_recipe
    from unitransformer.cli import run_main

    sys.exit(run_main(lambda: run_recipe(PRESET, show), is_whole_process=True))
