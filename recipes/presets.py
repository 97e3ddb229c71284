"""A recipe's named sizes, and its defaults on CPUs and on GPUs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from unitransformer.cli import suggest
from unitransformer.config import ModelConfig, Precision, Recipe


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The settings of a run without options on one kind of device."""

    batch_size: int  # samples per device
    max_steps: int
    warmup_steps: int
    learning_rate: float
    precision: Precision = "32-true"
    pad_vocabulary: int = 0  # of sizes other than `reference`


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A recipe with its sizes and defaults."""

    recipe: Recipe
    sizes: Mapping[str, ModelConfig] = field(hash=False)
    cpu: Defaults  # a short run: minutes on two cores
    cuda: Defaults

    def model_config(self, size: str = "reference", **overrides: Any) -> ModelConfig:
        """Returns the shape called `size` with some fields changed.

        For images `num_positions` follows from the image and patch size unless it is given.

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
