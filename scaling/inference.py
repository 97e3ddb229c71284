"""Which cells a lack of memory settles: what did not fit does not fit with more of everything.

A config needs at least as much as another if it asks for at least as much on every axis that
memory grows with, and is the same in all else. Whether that is so in truth is looked at again for a
share of the cells that were settled.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from unitransformer.config import Precision, RunConfig, to_dict

# Larger needs more. Both mixed ones keep float32 weights and 16-bit activations.
PRECISION: dict[Precision, int] = {"bf16-true": 0, "16-mixed": 1, "bf16-mixed": 1, "32-true": 2}
CHECKPOINTING = {"full": 0, "selective": 1, "off": 2}
# These change what is trained or measured and not what is held at the peak.
FREE: dict[str, Any] = {
    "max_steps": 1,
    "validate_every": 1,
    "log_every": 1,
    "checkpoint_every": 0,
    "until_interval": None,
    "ceiling_s": 0.0,
    "seed": 0,
}


def needs_at_least(config: RunConfig, other: RunConfig) -> bool:
    """Whether `config` needs at least the memory of `other` on a device."""
    return _rest(config) == _rest(other) and all(
        own >= its for own, its in zip(_demands(config), _demands(other), strict=True)
    )


def _demands(config: RunConfig) -> tuple[float, ...]:
    """Each grows with the memory that a device needs."""
    parallel = config.parallel
    # Whole weights are on every device however many there are, and their gradients' buckets too.
    divides = parallel.is_sharded or parallel.uses_deepspeed
    shards = parallel.devices if parallel.strategy == "hsdp" else parallel.world_size
    return (
        config.batch_size,
        config.sequence_length,
        -shards if divides else 0,
        PRECISION[parallel.precision],
        CHECKPOINTING[parallel.activation_checkpointing],
        -parallel.cpu_offload,
        float("inf") if config.loss_chunk == 0 else config.loss_chunk,
        config.model.width,
        config.model.num_layers,
        config.model.feedforward_width,
        config.model.num_classes,
        config.accumulate > 1,
    )


def _rest(config: RunConfig) -> dict[str, Any]:
    """What has to be the same: all that `_demands` does not order."""
    whole = to_dict(replace(config, **FREE))
    for name in ("size", "batch_size", "accumulate", "loss_chunk", "optimizer"):
        del whole[name]
    for name in ("width", "num_layers", "num_heads", "feedforward_width", "num_classes"):
        del whole["model"][name]
    if not config.model.reads_pictures:
        del whole["model"]["num_positions"]
    del whole["data"]["sequence_length"], whole["data"]["num_workers"]
    is_alone = config.parallel.world_size == 1
    spread = ("devices", "num_nodes", "precision", "activation_checkpointing", "cpu_offload")
    for name in spread:
        del whole["parallel"][name]
    # One device and several differ in what is communicated, which takes memory of its own.
    return {**whole, "is_alone": is_alone}


def find_cause(
    config: RunConfig, too_large: Mapping[str, RunConfig], fitting: Sequence[RunConfig]
) -> str | None:
    """A cell that did not fit and settles `config`; None if none does.

    Args:
        too_large: configs that ran out of memory, by their cell.
        fitting: configs that ran. One that needs at least as much as a cell that did not fit
            refutes that cell: it settles nothing any more.
    """
    for cell, other in too_large.items():
        if needs_at_least(config, other) and not any(needs_at_least(f, other) for f in fitting):
            return cell
    return None


def is_checked_again(cell: str, share: float) -> bool:
    """Whether a settled cell is run all the same: decided by its id alone, so that everybody who
    works on a sweep decides alike."""
    return int(hashlib.sha256(cell.encode()).hexdigest()[:8], 16) < share * 2**32
