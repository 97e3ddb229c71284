"""Estimates the peak memory of published runs that shard weights, optimizer states and positions.

T positions of a micro-batch on one GPU | D width | F feed-forward width | K width of the keys
V classes | L layers | N parameters

The formulas are those of `scaling.prediction.memory`, for models and software of other suites.
Nothing in them is fitted to these runs. Sources print what torch's allocator reserves, which is a
twentieth above what it hands out, as assumed for this suite's own runs.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.prediction.fit_file import LEVEL
from scaling.prediction.memory import FREE_SHARE
from scaling.prediction.published_work import KEEPS_WEIGHTS
from scaling.published.conventions import llama_of
from scaling.published.csv_rows import PublishedRow

SHARDED = re.compile(r"FSDP|HSDP")
DIVIDES_TENSORS = re.compile(r"\b(TP|PP)([2-9]|\d\d)")
POSITIONS_OVER = re.compile(r"\bCP(\d+)")
# AdamW of mixed precision: weights and two moments in float32. Gradients are freed before a step,
# so that none is there when the backward pass begins, with the logits.
BYTES_OF_STATES = 12
BYTES_OF_GRADIENTS = 4
# The log-probabilities, their gradients, and those of the logits, in float32.
BYTES_OF_A_LOGIT = 12


@dataclass(frozen=True, kw_only=True)
class _Shape:
    positions: int  # of one GPU
    width: int
    hidden: int
    keys: int  # width of keys, and of values
    is_gated: bool
    num_layers: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        matrices = 3 if self.is_gated else 2
        return 2 * self.width * (self.width + self.keys) + matrices * self.width * self.hidden

    @property
    def outer_parameters(self) -> int:
        return (2 if self.is_gated else 1) * self.width * self.vocabulary


def estimate_peak_bytes(row: PublishedRow) -> int | None:
    """Returns the peak of one GPU; None if a size is missing or layers or tensors are divided."""
    shape = _shape_of(row)
    if shape is None or not SHARDED.match(row.strategy) or DIVIDES_TENSORS.search(row.strategy):
        return None
    parameters = shape.num_layers * shape.layer_parameters + shape.outer_parameters
    states = BYTES_OF_STATES * parameters // row.num_gpus
    gradients = BYTES_OF_GRADIENTS * parameters // row.num_gpus
    keeps = KEEPS_WEIGHTS.fullmatch(row.strategy) and row.num_gpus > 1
    gathered = 2 * (parameters if keeps else shape.outer_parameters + shape.layer_parameters)
    kept = _layers_bytes(row, shape)
    logits = BYTES_OF_A_LOGIT * shape.positions * shape.vocabulary
    is_recomputed = (row.activation_checkpointing or "none") != "none"
    whole = shape.positions * _whole_layer(row, shape)
    # While a layer is recomputed, the next one is gathered and the last one reduced in float32.
    inside = (whole if is_recomputed else 0) + (2 + 4) * shape.layer_parameters
    begin = states + gathered + kept + logits
    backward = states + gathered + kept + inside
    step = states + gradients + gathered
    return math.ceil((1 + FREE_SHARE) * max(begin, backward, step))


def plain_estimate(row: PublishedRow) -> int | None:
    """Returns states of 16 bytes and activations as a GPT keeps them, without logits and buffers.

    Source: Korthikanti et al. 2023, "Reducing activation recomputation in large transformer
    models", 34 bytes per position and channel; 2 with full checkpointing.
    """
    shape = _shape_of(row)
    if shape is None:
        return None
    parameters = shape.num_layers * shape.layer_parameters + shape.outer_parameters
    per_channel = 2 if row.activation_checkpointing == "full" else 34
    activations = per_channel * shape.positions * shape.width * shape.num_layers
    return 16 * parameters // row.num_gpus + activations


def _shape_of(row: PublishedRow) -> _Shape | None:
    sizes = (row.num_layers, row.width, row.num_heads, row.vocabulary, row.sequence_length)
    if None in sizes or row.micro_batch is None:
        return None
    layers, width, heads, vocabulary, length = (size or 0 for size in sizes)
    over = POSITIONS_OVER.search(row.strategy)
    llama = llama_of(row.model)
    kv_heads = row.num_kv_heads or (llama.num_kv_heads if llama else heads)
    return _Shape(
        positions=row.micro_batch * length // (int(over[1]) if over else 1),
        width=width,
        hidden=llama.feedforward_width if llama else 4 * width,
        keys=width * kv_heads // heads,
        is_gated=llama is not None,
        num_layers=layers,
        vocabulary=vocabulary,
    )


def _layers_bytes(row: PublishedRow, shape: _Shape) -> int:
    """Returns what all layers keep, by the kind of checkpointing."""
    whole, kind = _whole_layer(row, shape), row.activation_checkpointing or "none"
    inputs = 2 * shape.width
    if kind == "none":
        per_layer = float(whole)
    elif kind == "full":
        per_layer = inputs
    elif "2nd" in kind or "layer" in kind:
        per_layer = (whole + inputs) / 2
    else:
        # torchtitan keeps attention and every second product: queries, values, gate and down.
        products = 2 * shape.width + shape.keys + shape.hidden
        per_layer = inputs + 2 * (products + shape.width) + 4 * (row.num_heads or 0)
    return int(per_layer * shape.positions * shape.num_layers)


def _whole_layer(row: PublishedRow, shape: _Shape) -> int:
    """Returns the bytes that a layer keeps per position, in 16 bits.

    Inputs and results of two norms, queries, the attention's result, keys, values; and of the
    feed-forward the products, the activation and, where it is gated, what enters the last product.
    Without a compiler torch computes a norm in float32, keeps its input so, and keeps the result
    before it is scaled.
    """
    channels = 6 * shape.width + 2 * shape.keys
    channels += (4 if shape.is_gated else 2) * shape.hidden
    eager = 0 if row.is_compiled else 2 * (4 + 2 - 2) * shape.width
    return 2 * channels + eager + 4 * (row.num_heads or 0)


@dataclass(frozen=True, kw_only=True)
class JudgedMemory:
    """The estimate of a published row beside its peak."""

    error: float  # of the estimate, as a share of the peak
    null_error: float  # of `plain_estimate`
    is_inside: bool  # the 90 % interval, as wide as the errors of the other sources


def judge_memory(rows: Sequence[PublishedRow], known: Sequence[PublishedRow]) -> list[JudgedMemory]:
    """Judges the rows that state a peak and can be described.

    Args:
        known: rows whose errors give the intervals; those of the judged row's source are left out.
    """
    errors = {row: error for row in known if (error := _log_error(row)) is not None}
    judged = []
    for row in rows:
        error, plain = _log_error(row), plain_estimate(row)
        others = [abs(e) for other, e in errors.items() if other.source != row.source]
        if error is None or plain is None or not others:
            continue
        assert row.peak_bytes is not None
        judged.append(
            JudgedMemory(
                error=math.expm1(error),
                null_error=plain / row.peak_bytes - 1,
                is_inside=abs(error) <= float(np.quantile(others, LEVEL)),
            )
        )
    return judged


def _log_error(row: PublishedRow) -> float | None:
    if row.peak_bytes is None or (estimate := estimate_peak_bytes(row)) is None:
        return None
    return math.log(estimate / row.peak_bytes)
