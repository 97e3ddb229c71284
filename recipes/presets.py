"""What a recipe is made of: named sizes, and defaults for the machine it finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from unitransformer.cli import suggest
from unitransformer.config import ModelConfig, Precision, Recipe


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """A run with no options on one kind of device."""

    batch_size: int  # samples a device takes at once
    max_steps: int
    warmup_steps: int
    learning_rate: float
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A recipe: its name, its sizes, and what it does on a CPU and on GPUs."""

    recipe: Recipe
    sizes: Mapping[str, ModelConfig] = field(hash=False)
    cpu: Defaults  # a short real run: minutes on two cores
    cuda: Defaults

    def model_config(self, size: str = "reference", **overrides: Any) -> ModelConfig:
        """The shape called `size`, with single fields changed.

        Pictures derive `num_positions` from the sizes of image and patch unless it is given.

        Raises:
            ValueError: an unknown size or field, or a shape that cannot be built.
        """
        if size not in self.sizes:
            raise ValueError(f"size {size!r} is not known; {suggest(size, self.sizes)}")
        known = [field.name for field in fields(ModelConfig)]
        for name in overrides:
            if name not in known:
                raise ValueError(f"model.{name} is not a field; {suggest(name, known)}")
        base = self.sizes[size]
        image_size = overrides.get("image_size", base.image_size)
        patch_size = overrides.get("patch_size", base.patch_size)
        if image_size and patch_size and "num_positions" not in overrides:
            overrides["num_positions"] = (image_size // patch_size) ** 2 + 1
        return replace(base, **overrides)
