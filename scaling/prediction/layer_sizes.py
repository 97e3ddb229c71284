"""Sizes of numbers in a step, of the copies that autocast makes, and of the head."""

from dataclasses import replace

from scaling.prediction.parameters import count_numbers, embedding_parameters, head_parameters
from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.costs.memory import saved_by_kind


def count_head_numbers(config: RunConfig) -> int:
    """Returns the numbers of the head, with a matrix that it shares with the embedding."""
    model = config.model
    tied = count_numbers(embedding_parameters(model)) if model.tied_head else 0
    return count_numbers(head_parameters(model)) + tied


def product_size(config: RunConfig) -> int:
    """Returns the bytes of a number that a matrix product reads."""
    return 4 if config.parallel.precision == "32-true" else 2


def gradient_size(parallel: ParallelConfig) -> int:
    """Returns the bytes of a number of a gradient that the optimizer reads."""
    return 2 if parallel.precision == "bf16-true" else 4


def new_gradient_size(config: RunConfig) -> int:
    """Returns the bytes of a number of a gradient just computed; autocast makes a float32 copy."""
    if config.parallel.precision == "32-true":
        return 4
    is_copied = config.parallel.precision != "bf16-true" and not config.parallel.is_sharded
    return 6 if is_copied and not config.parallel.uses_deepspeed else 2


def sizes_between_products(config: RunConfig) -> tuple[int, int]:
    """Returns the bytes of a number between the layers, and of one that a norm reads."""
    parallel = config.parallel
    full = replace(config, parallel=replace(parallel, activation_checkpointing="full"))
    numbers = config.batch_size * config.sequence_length * config.model.width
    residual = saved_by_kind(full)["layers"] // (config.model.num_layers * numbers)
    is_float32 = parallel.accelerator == "cuda" and parallel.precision.endswith("mixed")
    return residual, 4 if is_float32 and not parallel.uses_deepspeed else residual


def copied_layer_bytes(config: RunConfig) -> int:
    """Returns autocast's 16-bit copies of a layer's matrices, under strategies that shard nothing.

    Lightning's autocast keeps no cache, so a matrix is copied for each use. The copy stays for the
    backward pass, but that of a checkpointed layer only from its recomputation on.
    """
    parallel, width = config.parallel, config.model.width
    if parallel.is_sharded or parallel.uses_deepspeed or not parallel.precision.endswith("mixed"):
        return 0
    return 2 * width * (4 * width + 2 * config.model.feedforward_width)


def copied_patches_bytes(config: RunConfig) -> int:
    """Returns autocast's 16-bit copy of the matrix that embeds patches, likewise."""
    model = config.model
    if not copied_layer_bytes(config) or model.patch_size is None:
        return 0
    return 2 * model.width * model.num_channels * model.patch_size**2


def added_layer_bytes(config: RunConfig) -> int:
    """Returns what one more layer would keep, all of whose positions are computed."""
    deeper = replace(config, model=replace(config.model, num_layers=config.model.num_layers + 1))
    return saved_by_kind(deeper)["layers"] - saved_by_kind(config)["layers"]
