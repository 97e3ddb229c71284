"""Bytes of one rank that depend on the strategy: weights, gradients, optimizer and buffers."""

import functools
import math
from dataclasses import dataclass

from scaling.prediction.communication import (
    PERSISTENT_NUMBERS,
    REUSE_NUMBERS,
    ZERO_BUCKET,
    ZERO_BUCKET_MULTIPLE,
    small_sizes,
)
from scaling.prediction.layer_sizes import count_head_numbers, gradient_size, product_size
from scaling.prediction.parameters import (
    Parameter,
    count_numbers,
    count_padded_rows,
    embedding_parameters,
    head_parameters,
    layer_parameters,
    outer_parameters,
    size_of,
)
from unitransformer.config import ModelConfig, RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.costs.memory import keeps_gradients

# DeepSpeed's default of `stage3_prefetch_bucket_size`.
PREFETCH_NUMBERS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class RankStates:
    """Bytes of one rank that depend on the strategy, and not on the batch."""

    parameters: int
    optimizer: int
    gradients: int  # of all parameters, when the backward pass is over
    is_gradient_kept: bool = False  # between the optimizer step and the next backward pass
    gathered: int = 0  # whole weights from the forward pass on
    gathered_layer: int = 0  # of one layer
    last_layer: int = 0  # of the last layer, when the forward pass ends
    late_layer: int = 0  # of `gathered`, in the forward pass not before that of a layer
    released_head: int = 0  # of `gathered`, when the backward pass of the head is over
    released_layer: int = 0  # likewise, of a layer
    root_buffers: int = 0  # that received the root and the first layer, until these are copied out
    root_gradients: int = 0  # whole ones of embedding and head, as computed and as reduced
    head_gradients: int = 0  # whole ones of the head, before reduction
    layer_gradients: int = 0  # of the head and of a matrix of a layer
    all_layer_gradients: int = 0  # of the head and of a layer
    layer_buffers: int = 0  # that received a layer and the one before it, in the forward pass
    layer_buffer: int = 0  # that received weights, while the last layer or the one before computes
    next_layer: int = 0  # that received the layer which the backward pass needs next
    waiting_gradients: int = 0  # whole ones at the end of the backward pass, if shards come later
    reduced_layer: int = 0  # the gradients of a layer in one array, until the next one is reduced
    reduction: int = 0  # all copies of a layer's gradients while it is reduced
    layer_shard: int = 0  # what remains of it
    buffers: int = 0  # in the backward pass of the layers
    kept_buffers: int = 0  # at any time
    step: int = 0  # in the optimizer step


@functools.lru_cache(maxsize=8192)
def rank_states(config: RunConfig) -> RankStates:
    model, parallel = config.model, config.parallel
    numbers, world = count_parameters(model), parallel.world_size
    is_summed = config.accumulate > 1 and world > 1
    size = 2 if parallel.precision == "bf16-true" else 4
    match parallel.strategy:
        case "fsdp" | "hsdp":
            return _fsdp2_states(config)
        case "fsdp1":
            return _fsdp1_states(config)
        case "zero1" | "zero2" | "zero3":
            return _zero_states(config)
        case _:
            return RankStates(
                parameters=size * numbers,
                optimizer=2 * size * numbers,
                gradients=size * numbers,
                is_gradient_kept=True,
                # Between micro-batches, gradients are no views of DDP's buckets.
                kept_buffers=size * numbers if is_summed and parallel.strategy == "ddp" else 0,
            )


def _fsdp2_states(config: RunConfig) -> RankStates:
    """FSDP2 gathers into a buffer and copies out, and copies gradients into one to be reduced."""
    model, parallel = config.model, config.parallel
    ranks = parallel.devices if parallel.strategy == "hsdp" else parallel.world_size
    size, gathered_size = gradient_size(parallel), product_size(config)
    sum_size = size
    outer, layer = outer_parameters(model), layer_parameters(model)
    shard = _shard(outer, ranks) + model.num_layers * _shard(layer, ranks)
    whole_outer, whole_layer = count_numbers(outer), count_numbers(layer)
    # One rank copies weights one by one, and frees the copies of a layer after its backward pass.
    is_one = ranks == 1
    # Collectives move equal shards: padded ones, if the ranks do not divide the rows.
    padded_outer, padded_layer = (count_padded_rows(p, ranks) for p in (outer, layer))
    whole_gradients = gathered_size * whole_outer + sum_size * padded_outer
    whole_gradients -= size * _shard(outer, ranks)
    if parallel.accelerator == "cpu" and not is_one:  # gloo copies what it scatters once more
        whole_gradients = max(whole_gradients, 2 * sum_size * padded_outer)
    layer_shard = sum_size * _shard(layer, ranks)
    return RankStates(
        parameters=size * shard,
        optimizer=2 * size * shard,
        gradients=size * shard,
        is_gradient_kept=True,
        gathered=gathered_size * (count_parameters(model) if is_one else whole_outer),
        gathered_layer=0 if is_one else gathered_size * whole_layer,
        last_layer=0 if is_one else gathered_size * whole_layer,
        late_layer=gathered_size * whole_layer if is_one else 0,
        released_layer=gathered_size * whole_layer if is_one else 0,
        # FSDP2 frees the buffer of a gather after that of the next one is allocated.
        root_buffers=0 if is_one else gathered_size * (padded_outer + padded_layer),
        layer_buffers=0 if is_one else 2 * gathered_size * padded_layer,
        layer_buffer=0 if is_one else gathered_size * padded_layer,
        next_layer=0 if is_one else gathered_size * padded_layer,
        root_gradients=whole_gradients,
        head_gradients=gathered_size * count_head_numbers(config),
        layer_gradients=gathered_size
        * (count_head_numbers(config) + model.width * model.feedforward_width),
        all_layer_gradients=gathered_size * (count_head_numbers(config) + whole_layer),
        reduced_layer=sum_size * padded_layer,
        reduction=gathered_size * whole_layer + sum_size * padded_layer + layer_shard,
        layer_shard=layer_shard,
    )


def _fsdp1_states(config: RunConfig) -> RankStates:
    """FSDP1 gathers weights in place; a layer's gradients become one array, reduced at once.

    Precisions of 16 bits cast the shard before it is gathered, and the array before it is reduced.
    One rank gathers nothing, and casts the weights of a layer while it computes.
    """
    model, parallel = config.model, config.parallel
    ranks = parallel.world_size
    size, gathered_size = gradient_size(parallel), product_size(config)
    sum_size = size
    is_cast, is_one = gathered_size != size, ranks == 1
    is_gathered = is_cast or not is_one
    outer, layer = (count_numbers(p(model)) for p in (outer_parameters, layer_parameters))
    outer_shard, layer_shard = math.ceil(outer / ranks), math.ceil(layer / ranks)
    shard = outer_shard + model.num_layers * layer_shard
    # gloo receives into an array of its own, and copies what it scatters.
    is_copied = parallel.accelerator == "cpu" and not is_one
    received_outer, received_layer = (
        gathered_size
        * ((ranks * part if is_copied else 0) + (part if is_cast and not is_one else 0))
        for part in (outer_shard, layer_shard)
    )
    gathered_outer, gathered_layer = (
        gathered_size * ranks * part if is_gathered else 0 for part in (outer_shard, layer_shard)
    )

    def reduced(numbers: int, part: int) -> int:
        """Returns the array, as computed and as reduced, and the shard that comes from it."""
        cast = gathered_size * numbers if is_cast else 0
        result = 0 if is_one else sum_size * part
        return cast + (2 if is_copied else 1) * sum_size * ranks * part + result

    # Making the array needs the gradients as computed, and the weights are there until it is made.
    made_outer = gathered_outer + 2 * gathered_size * outer
    made_layer = gathered_layer + 2 * gathered_size * layer
    return RankStates(
        parameters=size * shard,
        optimizer=2 * size * shard,
        gradients=size * shard,
        is_gradient_kept=True,
        gathered=gathered_outer,
        gathered_layer=gathered_layer,
        root_buffers=max(received_layer, received_outer - gathered_layer),
        layer_buffers=received_layer,
        next_layer=0 if is_one else gathered_layer,
        # The shard is among the gradients at the end.
        root_gradients=max(made_outer, reduced(outer, outer_shard)) - size * outer_shard,
        head_gradients=gathered_size * count_head_numbers(config),
        layer_gradients=gathered_size
        * (count_head_numbers(config) + model.width * model.feedforward_width),
        all_layer_gradients=gathered_size * (count_head_numbers(config) + layer),
        reduction=max(made_layer, reduced(layer, layer_shard)),
        layer_shard=sum_size * layer_shard,
    )


def _zero_states(config: RunConfig) -> RankStates:
    """DeepSpeed keeps float32 weights and moments of a share, beside the weights of the network."""
    parallel, world = config.parallel, config.parallel.world_size
    numbers = count_parameters(config.model)
    share = math.ceil(numbers / world)
    size = 4 if parallel.precision == "32-true" else 2
    blocks = math.ceil(numbers / ZERO_BUCKET_MULTIPLE)
    bucket = size * min(ZERO_BUCKET, blocks * ZERO_BUCKET_MULTIPLE)
    if parallel.strategy == "zero3":
        return _zero3_states(config)
    is_summed = config.accumulate > 1
    buffers = 2 * bucket  # communication of one overlaps with filling the other
    return RankStates(
        parameters=size * numbers,
        optimizer=12 * share,
        # Stage 1 reduces the sum over micro-batches.
        gradients=size * (numbers if is_summed and parallel.strategy == "zero1" else share),
        # Gradients wait until a bucket is full; the last one is never before the end.
        waiting_gradients=0 if is_summed else bucket,
        buffers=0 if is_summed else buffers,
        kept_buffers=buffers if is_summed else 0,
        # A share's gradients in one array, and in float32.
        step=(4 if size == 4 else size + 4) * share,
    )


def _zero3_states(config: RunConfig) -> RankStates:
    """Stage 3 gathers many layers into one array ahead of their use, and copies each parameter out.

    The array stays until the last of its parameters is used. One rank gathers nothing.
    """
    model, parallel = config.model, config.parallel
    world, numbers, size = parallel.world_size, count_parameters(model), product_size(config)
    share = math.ceil(numbers / world)
    blocks = math.ceil(numbers / ZERO_BUCKET_MULTIPLE)
    bucket = min(ZERO_BUCKET, blocks * ZERO_BUCKET_MULTIPLE)
    small = sum(size * calls for size, calls in small_sizes(model)) if world > 1 else 0
    layer = count_numbers(layer_parameters(model))
    embedding, head, large_layer = (
        _large_numbers(p) if world > 1 else 0
        for p in (embedding_parameters(model), head_parameters(model), layer_parameters(model))
    )
    # Layers stay gathered while they are used again soon.
    kept = min(numbers, REUSE_NUMBERS + layer) if world > 1 else 0
    # gloo copies what it scatters, also on one rank.
    copies = 2 if parallel.accelerator == "cpu" else 1
    # A loss that makes its gradients in the forward pass has the weights of the head from the
    # begin to the end of a step: the whole objective uses them.
    is_early = keeps_gradients(config)
    received = size * _received_beside(model, model.num_layers - 1, is_early) if world > 1 else 0
    return RankStates(
        parameters=size * (share + small),
        optimizer=12 * share,
        gradients=size * share,
        is_gradient_kept=True,
        gathered=size * max(0, kept - small),
        released_head=0 if is_early else size * head,
        released_layer=size * large_layer if kept == numbers else 0,
        root_buffers=size * _received_beside(model, 1, is_early) if world > 1 else 0,
        layer_buffers=received,
        layer_buffer=received,
        layer_gradients=size * model.width * model.feedforward_width,
        # Those of a layer, which is one unit, are reduced together.
        all_layer_gradients=size * layer,
        # The last bucket in one array, while the embedding is still there.
        root_gradients=size
        * (copies * min(bucket, numbers) + embedding + (head if is_early else 0)),
        kept_buffers=size * bucket,
        # A share's gradients in one array, and in float32.
        step=(4 if size == 4 else size + 4) * share,
    )


def _large_numbers(parameters: tuple[Parameter, ...]) -> int:
    """Returns the numbers of the parameters that ZeRO-3 shards."""
    sizes = map(size_of, parameters)
    return sum(size for size in sizes if size > PERSISTENT_NUMBERS)


@functools.lru_cache(maxsize=256)
def _received_beside(model: ModelConfig, num_layers: int, is_head_early: bool) -> int:
    """Returns the numbers of the array that received weights both in and after `num_layers` layers.

    Parameters are gathered in the order of their use, in one array until it has `PREFETCH_NUMBERS`.
    """
    head, layer = head_parameters(model), layer_parameters(model)
    parts = [embedding_parameters(model), *model.num_layers * [layer]]
    parts = [head, *parts] if is_head_early else [*parts, head]
    used = sum(map(_large_numbers, parts[: num_layers + 1 + is_head_early]))
    begin = end = 0
    for part in parts:
        for parameter in part:
            end += _large_numbers((parameter,))
            if end - begin >= PREFETCH_NUMBERS:
                if begin < used < end:
                    return end - begin
                begin = end
    return end - begin if begin < used < end else 0


def _shard(parameters: tuple[Parameter, ...], ranks: int) -> int:
    """Returns the numbers of rank 0, which holds the most rows of each parameter."""
    return sum(math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for _, shape in parameters)
