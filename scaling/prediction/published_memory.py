"""Estimates the peak memory of published runs that shard weights, optimizer states and positions.

T positions of a micro-batch on one GPU | D width | F feed-forward width | K width of the keys
V classes | L layers | N parameters

This is an estimator of its own, for models and software of other suites. It uses the ideas of
`scaling.prediction.memory`, which is not run on these rows, so its error says little about that of
`predict`. No coefficient is fitted, but the forms were chosen with the judged rows in view: what a
logit costs, and which versions compile the loss or shard the head alone. Sources print what torch's
allocator reserves, which is a twentieth above what it hands out, as assumed for this suite's runs.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.prediction.fit_file import LEVEL
from scaling.prediction.memory import FREE_SHARE
from scaling.prediction.published_work import KEEPS_WEIGHTS, POSITIONS_OVER
from scaling.published.conventions import llama_of
from scaling.published.csv_rows import PublishedRow

SHARDED = re.compile(r"FSDP|HSDP")
DIVIDES_TENSORS = re.compile(r"\b(TP|PP)([2-9]|\d\d)")
# AdamW of mixed precision: weights and two moments in float32. Gradients are freed before a step,
# so that none is there when the backward pass begins, with the logits.
BYTES_OF_STATES = 12
BYTES_OF_GRADIENTS = 4
# The log-probabilities, their gradients, and those of the logits, in float32. None of them fits
# into the block of the freed logits in 16 bits, which the allocator therefore keeps.
BYTES_OF_A_LOGIT = 14
BYTES_OF_A_COMPILED_LOGIT = 4  # a logit and its gradient in 16 bits
# Versions of torchtitan, as source and start of the GPU. It compiled no loss from 2024-12-19 (pull
# request 755) to the spring of 2025 (1033), and it sharded embedding and head as one group until
# 2025-07-29 (1094). torchao's runs on H100 used an alpha version of torch 2.7.
COMPILES_LOSS = (("torchtitan/trainy 2025-06", ""), ("torchao", "MI300X"), ("torchao", "B200"))
SHARDS_HEAD_ALONE = (("torchao", "MI300X"), ("torchao", "B200"))


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
    # The group that stays gathered between forward and backward pass.
    outer = shape.outer_parameters // (1 + _is_one_of(row, SHARDS_HEAD_ALONE))
    keeps = KEEPS_WEIGHTS.fullmatch(row.strategy) and row.num_gpus > 1
    gathered = 2 * (parameters if keeps else outer + shape.layer_parameters)
    kept = _layers_bytes(row, shape)
    is_compiled = bool(row.is_compiled) and _is_one_of(row, COMPILES_LOSS)
    all_logits = shape.positions * shape.vocabulary
    logits = all_logits * (BYTES_OF_A_COMPILED_LOGIT if is_compiled else BYTES_OF_A_LOGIT)
    is_recomputed = (row.activation_checkpointing or "none") != "none"
    whole = shape.positions * _whole_layer(row, shape)
    # While a layer is recomputed, the next one is gathered and the last one reduced in float32.
    inside = (whole if is_recomputed else 0) + (2 + 4) * shape.layer_parameters
    begin = states + gathered + kept + logits
    backward = states + gathered + kept + inside
    # The gradients of the last group are copied to float32 to be reduced. If no block of the freed
    # logits holds this copy, the allocator reserves another one.
    reduced = 4 * outer
    is_new = reduced > (2 if is_compiled else 4) * all_logits
    end = states + gradients + (2 + 2) * outer + reduced
    step = states + gradients + gathered
    peak = max(max(begin, backward) + (reduced if is_new else 0), end, step)
    return math.ceil((1 + FREE_SHARE) * peak)


def _is_one_of(row: PublishedRow, versions: Sequence[tuple[str, str]]) -> bool:
    return any(row.source == source and row.gpu.startswith(gpu) for source, gpu in versions)


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

    Inputs and results of two norms, queries, the attention's result; keys and values, repeated for
    every head of the queries; and of the feed-forward the products, the activation and, where it is
    gated, what enters the last product.
    Without a compiler torch computes a norm in float32, keeps its input so, and keeps the result
    before it is scaled.
    """
    channels = 8 * shape.width
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
