"""Trains ViT to label images: `python -m recipes.vit --devices 8`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.presets import Defaults, Preset
from unitransformer.config import ModelConfig

if TYPE_CHECKING:
    from unitransformer.run import RunOutcome


def _vit(
    letter: str, layers: int, width: int, heads: int, feedforward: int, *, patch_size: int
) -> dict[str, ModelConfig]:
    """Returns `letter` with its own patch size, and with 16 and 14, for images of 224 pixels."""
    return {
        name: ModelConfig(
            width=width,
            num_layers=layers,
            num_heads=heads,
            feedforward_width=feedforward,
            num_classes=1000,
            num_positions=(224 // size) ** 2 + 1,
            activation="gelu",
            final_norm=True,
            image_size=224,
            patch_size=size,
        )
        for name, size in ((letter, patch_size), (f"{letter}16", 16), (f"{letter}14", 14))
    }


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
    # g: Zhai et al. 2022, table 2. A name without a number has the patch size of its paper.
    **_vit("s", 12, 384, 6, 1536, patch_size=16),
    **_vit("b", 12, 768, 12, 3072, patch_size=16),
    **_vit("l", 24, 1024, 16, 4096, patch_size=16),
    **_vit("h", 32, 1280, 16, 5120, patch_size=14),
    **_vit("g", 40, 1408, 16, 6144, patch_size=14),
}

PRESET = Preset(
    recipe="vit",
    sizes=SIZES,
    cpu=Defaults(batch_size=8, max_steps=60, warmup_steps=10, learning_rate=3e-4),
    cuda=Defaults(
        batch_size=64, max_steps=2000, warmup_steps=100, learning_rate=3e-4, precision="bf16-mixed"
    ),
)
model_config = PRESET.model_config


def show(outcome: "RunOutcome", folder: Path) -> list[str]:
    """Writes figures of samples, of an image cut into patches, and of predicted labels."""
    from recipes.showcase import image_grid, label_images, patch_figure, save_image
    from unitransformer.data.datamodule import validation_batch

    source, network = outcome.data.source, outcome.network
    if not source.class_names or network is None:
        return []
    samples, batch = (
        validation_batch(dataset, range(min(12, len(dataset))), network.pe.pe.device)
        for dataset in (source.train, source.validation)
    )
    names = [source.class_names[label] for label in samples["targets"].tolist()]
    save_image(image_grid(samples["inputs"], names), folder / "samples.png")
    save_image(patch_figure(samples["inputs"][0], network.config), folder / "patches.png")
    labels, probabilities = label_images(network, batch["inputs"])
    truth = batch["targets"].tolist()
    # A model may have more labels than the data has classes.
    known = dict(enumerate(source.class_names))
    titles = [
        f"{known.get(label, '(no such class)')} ({probability:.0%})"
        for label, probability in zip(labels, probabilities, strict=True)
    ]
    colors = ["#2e8b57" if a == b else "#c0392b" for a, b in zip(labels, truth, strict=True)]
    path = folder / "predictions.png"
    save_image(image_grid(batch["inputs"], titles, colors=colors), path)
    return [f"predictions {path}"]


if __name__ == "__main__":
    from recipes.command_line import run_recipe
    from unitransformer.cli import run_main

    sys.exit(run_main(lambda: run_recipe(PRESET, show), is_whole_process=True))
