"""Builds a training step of each recipe at a small size."""

from collections.abc import Callable

import torch

from recipes import bert, gpt, vit
from recipes.presets import Preset
from unitransformer.config import DataConfig, RunConfig
from unitransformer.data.sources import Synthetic
from unitransformer.objectives import Objective
from unitransformer.training.optimizer import build_optimizer
from unitransformer.transformer import Transformer

PRESETS = {preset.recipe: preset for preset in (bert.PRESET, gpt.PRESET, vit.PRESET)}
SMALL = {"width": 128, "num_layers": 2, "num_heads": 4, "feedforward_width": 512}
SHAPE = {
    "bert": SMALL | {"num_classes": 2000},
    "gpt": SMALL | {"num_classes": 2000},
    "vit": SMALL | {"image_size": 64, "patch_size": 16},
}


def build_step(preset: Preset, batch_size: int, **shape: int) -> Callable[[], torch.Tensor]:
    """Returns a function that trains one step, always on the same batch, and returns the loss.

    Args:
        shape: fields of `ModelConfig` that differ from `SHAPE`.
    """
    torch.set_flush_denormal(True)
    config = RunConfig(
        recipe=preset.recipe,
        size="reference",
        model=preset.model_config("reference", **SHAPE[preset.recipe] | shape),
        data=DataConfig(source="synthetic"),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = Objective(Transformer(config.model)).to(device)
    optimizer = build_optimizer(objective.network.named_parameters(), config)
    order = torch.arange(batch_size)
    batch = Synthetic(config, batch_size).fill({"inputs": order, "targets": order}, device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = objective(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
