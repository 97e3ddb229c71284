"""Trains GPT to predict the next token: `python -m recipes.gpt --devices 8`."""

import sys
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

from recipes.presets import Defaults, Preset
from unitransformer.config import ModelConfig

if TYPE_CHECKING:
    from unitransformer.run import RunOutcome


def _gpt(num_layers: int, width: int, num_heads: int, num_positions: int) -> ModelConfig:
    """Returns a GPT-2 shape: GELU, a final norm, and a head tied to the token embeddings."""
    return ModelConfig(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        feedforward_width=4 * width,
        num_classes=50_257,
        num_positions=num_positions,
        causal=True,
        activation="gelu",
        final_norm=True,
        tied_head=True,
        head_bias=False,
    )


SIZES = {
    "reference": ModelConfig(
        width=768,
        num_layers=6,
        num_heads=6,
        feedforward_width=3072,
        num_classes=30_522,
        num_positions=64,
        dropout=0.2,
        causal=True,
    ),
    # Radford et al. 2019, table 2
    "124m": _gpt(12, 768, 12, 1024),
    "350m": _gpt(24, 1024, 16, 1024),
    "774m": _gpt(36, 1280, 20, 1024),
    "1.5b": _gpt(48, 1600, 25, 1024),
    # Brown et al. 2020, table 2.1, except where it contradicts itself: for 1.3b it prints 24 heads
    # of 128 and a width of 2,048, for 13b 40 heads of 128 and a width of 5,140.
    "1.3b": _gpt(24, 2048, 16, 2048),
    "2.7b": _gpt(32, 2560, 32, 2048),
    "6.7b": _gpt(32, 4096, 32, 2048),
    "13b": _gpt(40, 5120, 40, 2048),
    "175b": _gpt(96, 12_288, 96, 2048),
}

PRESET = Preset(
    recipe="gpt",
    sizes=SIZES,
    cpu=Defaults(batch_size=8, max_steps=100, warmup_steps=10, learning_rate=1e-3),
    cuda=Defaults(
        batch_size=64,
        max_steps=5000,
        warmup_steps=200,
        learning_rate=1e-3,
        precision="bf16-mixed",
        pad_vocabulary=128,
    ),
)
model_config = PRESET.model_config


def show(outcome: "RunOutcome", folder: Path) -> list[str]:
    """Continues the first half of a validation sample."""
    from recipes.showcase import continue_text
    from unitransformer.data.datamodule import validation_batch
    from unitransformer.data.sampler import permutation

    source, network = outcome.data.source, outcome.network
    if source.corpus is None or network is None:
        return []
    first = int(permutation(len(source.validation), 0, 0)[0])
    batch = validation_batch(source.validation, [first], network.pe.pe.device)
    tokens = batch["inputs"][0].tolist()
    prompt = tokens[: len(tokens) // 2]
    start, added = continue_text(network, source.corpus.tokenizer, prompt, num_tokens=48)
    return ["", "prompt:", indent(start, "    "), "continued:", indent(added, "    "), ""]


if __name__ == "__main__":
    from recipes.command_line import run_recipe
    from unitransformer.cli import run_main

    sys.exit(run_main(lambda: run_recipe(PRESET, show), is_whole_process=True))
