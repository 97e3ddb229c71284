"""ViT: the label of a picture. `python -m recipes.vit --devices 8`"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.presets import Defaults, Preset
from unitransformer.config import ModelConfig

if TYPE_CHECKING:
    from unitransformer.run import RunOutcome


def _vit(
    num_layers: int, width: int, num_heads: int, feedforward_width: int, patch_size: int
) -> ModelConfig:
    """A ViT shape for pictures of 224 pixels and 1,000 labels."""
    return ModelConfig(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        feedforward_width=feedforward_width,
        num_classes=1000,
        num_positions=(224 // patch_size) ** 2 + 1,
        activation="gelu",
        final_norm=True,
        image_size=224,
        patch_size=patch_size,
    )


def _family(
    letter: str, layers: int, width: int, heads: int, hidden: int, *, patch_size: int
) -> dict[str, ModelConfig]:
    """One shape with patches of `patch_size` by its letter alone, and with those of 16 and 14."""
    patches = {letter: patch_size, f"{letter}16": 16, f"{letter}14": 14}
    return {name: _vit(layers, width, heads, hidden, size) for name, size in patches.items()}


SIZES = {
    "reference": ModelConfig(
        width=768,
        num_layers=6,
        num_heads=6,
        feedforward_width=3072,
        num_classes=3,
        num_positions=197,
        image_size=224,
        patch_size=16,
    ),
    # s: Touvron et al. 2021, table 1; b, l, h: Dosovitskiy et al. 2021, table 1;
    # g: Zhai et al. 2022, table 2. A letter alone has the patch size of its paper.
    **_family("s", 12, 384, 6, 1536, patch_size=16),
    **_family("b", 12, 768, 12, 3072, patch_size=16),
    **_family("l", 24, 1024, 16, 4096, patch_size=16),
    **_family("h", 32, 1280, 16, 5120, patch_size=14),
    **_family("g", 40, 1408, 16, 6144, patch_size=14),
}

PRESET = Preset(
    recipe="vit",
    sizes=SIZES,
    cpu=Defaults(
        batch_size=8, max_steps=60, warmup_steps=10, learning_rate=3e-4, precision="32-true"
    ),
    cuda=Defaults(
        batch_size=64, max_steps=2000, warmup_steps=100, learning_rate=3e-4, precision="bf16-mixed"
    ),
)
model_config = PRESET.model_config


def show(outcome: "RunOutcome", folder: Path) -> list[str]:
    """Figures: sample pictures, one picture in patches, and what the network takes them for."""
    from recipes.showcase import image_grid, label_images, patch_figure, write_figure
    from unitransformer.data.datamodule import validation_batch

    source, network = outcome.data.source, outcome.network
    if not source.class_names or network is None:
        return []
    samples = validation_batch(
        source.train, range(min(12, len(source.train))), network.pe.pe.device
    )
    names = [source.class_names[label] for label in samples["targets"].tolist()]
    write_figure(image_grid(samples["inputs"], names), folder / "samples.png")
    write_figure(patch_figure(samples["inputs"][0], outcome.config.model), folder / "patches.png")
    asked = validation_batch(
        source.validation, range(min(12, len(source.validation))), network.pe.pe.device
    )
    labels, chances = label_images(network, asked["inputs"])
    truth = asked["targets"].tolist()
    # A model may know more labels than the data has names for.
    num_unnamed = outcome.config.model.num_classes - len(source.class_names)
    known = [*source.class_names, *("(no such class)" for _ in range(num_unnamed))]
    titles = [
        f"{known[label]} ({chance:.0%})" for label, chance in zip(labels, chances, strict=True)
    ]
    colors = ["#2e8b57" if a == b else "#c0392b" for a, b in zip(labels, truth, strict=True)]
    path = write_figure(
        image_grid(asked["inputs"], titles, colors=colors), folder / "predictions.png"
    )
    return [f"labelled    {path}"]


def main() -> None:
    from recipes.command_line import run_recipe

    sys.exit(run_recipe(PRESET, show))


if __name__ == "__main__":
    main()
