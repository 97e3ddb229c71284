"""Predicts the peak memory of one device in a training step, by category and by moment.

The peak is at one of some moments: in the forward pass of the first layer, of the last one or of
that before it, when the forward pass ends, when the backward pass begins, in the backward pass of
the head, in that of the last layer or at its end, when the backward pass ends, or in the optimizer
step. Where layers are gathered, the layer before the last has moments of its own: it works beside
the reduction of the last one, which may compute only some positions. Each is the sum of what is
alive then. Counted is what torch allocates; the context of the device is added, fragmentation is
not.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from scaling.prediction.communication import (
    PERSISTENT_NUMBERS,
    REUSE_NUMBERS,
    ZERO_BUCKET,
    ZERO_BUCKET_MULTIPLE,
    small_sizes,
)
from scaling.prediction.hardware import Hardware
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
from unitransformer.config import ModelConfig, ParallelConfig, RunConfig
from unitransformer.costs.flops import count_parameters, count_predicted_positions
from unitransformer.costs.memory import keeps_gradients, layer_bytes, loss_rows, saved_by_kind

SYNTHETIC_NUMBERS = 2**18  # of `unitransformer.data.sources`, drawn once for all samples
# Images of each digit in `unitransformer/data/digits.npz`.
NUM_DIGITS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
# Share of the allocated peak that CUDA's allocator reserves beyond it, as a guess from records.
FREE_SHARE = 0.05
# DeepSpeed's default of `stage3_prefetch_bucket_size`.
PREFETCH_NUMBERS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device at the moment of its peak; the categories add up to `total_bytes`."""

    moment: str
    parameters: int
    gradients: int
    optimizer: int
    gathered: int  # whole weights of sharded layers
    activations: Mapping[str, int]  # what the forward pass keeps, by what keeps it
    logits: int  # and what the loss computes from them
    communication: int  # buffers of gradients and collectives
    inputs: int  # samples and the table of positions
    context: int  # driver, libraries and communicators
    capacity: int  # of the device

    @property
    def allocated_bytes(self) -> int:
        """What torch's allocator hands out."""
        named = self.parameters + self.gradients + self.optimizer + self.gathered
        named += self.logits + self.communication + self.inputs
        return named + sum(self.activations.values())

    @property
    def total_bytes(self) -> int:
        return self.allocated_bytes + self.context

    @property
    def fits(self) -> bool:
        """Whether the peak and a twentieth of it, for fragmentation, fit on the device."""
        return self.total_bytes + FREE_SHARE * self.allocated_bytes <= self.capacity


@dataclass(frozen=True, kw_only=True)
class _States:
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
def _states(config: RunConfig) -> _States:
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
            return _States(
                parameters=size * numbers,
                optimizer=2 * size * numbers,
                gradients=size * numbers,
                is_gradient_kept=True,
                # Between micro-batches, gradients are no views of DDP's buckets.
                kept_buffers=size * numbers if is_summed and parallel.strategy == "ddp" else 0,
            )


def _fsdp2_states(config: RunConfig) -> _States:
    """FSDP2 gathers into a buffer and copies out, and copies gradients into one to be reduced."""
    model, parallel = config.model, config.parallel
    ranks = parallel.devices if parallel.strategy == "hsdp" else parallel.world_size
    size, gathered_size = _size_of_gradients(parallel), _product_size(config)
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
    return _States(
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
        head_gradients=gathered_size * _head_numbers(config),
        layer_gradients=gathered_size
        * (_head_numbers(config) + model.width * model.feedforward_width),
        all_layer_gradients=gathered_size * (_head_numbers(config) + whole_layer),
        reduced_layer=sum_size * padded_layer,
        reduction=gathered_size * whole_layer + sum_size * padded_layer + layer_shard,
        layer_shard=layer_shard,
    )


def _fsdp1_states(config: RunConfig) -> _States:
    """FSDP1 gathers weights in place; a layer's gradients become one array, reduced at once.

    Precisions of 16 bits cast the shard before it is gathered, and the array before it is reduced.
    One rank gathers nothing, and casts the weights of a layer while it computes.
    """
    model, parallel = config.model, config.parallel
    ranks = parallel.world_size
    size, gathered_size = _size_of_gradients(parallel), _product_size(config)
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
    return _States(
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
        head_gradients=gathered_size * _head_numbers(config),
        layer_gradients=gathered_size
        * (_head_numbers(config) + model.width * model.feedforward_width),
        all_layer_gradients=gathered_size * (_head_numbers(config) + layer),
        reduction=max(made_layer, reduced(layer, layer_shard)),
        layer_shard=sum_size * layer_shard,
    )


def _head_numbers(config: RunConfig) -> int:
    """Returns the numbers of the head, with a matrix that it shares with the embedding."""
    model = config.model
    tied = count_numbers(embedding_parameters(model)) if model.tied_head else 0
    return count_numbers(head_parameters(model)) + tied


def _new_gradient_size(config: RunConfig) -> int:
    """Returns the bytes of a number of a gradient just computed; autocast makes a float32 copy."""
    if config.parallel.precision == "32-true":
        return 4
    is_copied = config.parallel.precision != "bf16-true" and not config.parallel.is_sharded
    return 6 if is_copied and not config.parallel.uses_deepspeed else 2


def _new_head_gradients(config: RunConfig, scratch: int) -> int:
    """Returns the gradients of the head at the end of its product, or of the copy that follows.

    The float32 copy of autocast is made when the product's 16-bit copy of the weights is gone.
    """
    size, copied = _new_gradient_size(config), 0
    if size > 4:
        size, copied = 2, size - 2
    return max(size + scratch, copied) * _head_numbers(config)


def _early_gradients(config: RunConfig) -> int:
    """Returns the gradients that `single` and `ddp` have in the backward pass of the last layer.

    DDP has copied finished ones into its buckets; those of the matrix that is computed are new.
    """
    model = config.model
    if config.parallel.strategy not in ("single", "ddp"):
        return 0
    matrix = _new_gradient_size(config) * model.width * model.feedforward_width
    if config.parallel.strategy == "ddp" or config.accumulate > 1:
        return matrix
    # The layer that needs most is the one before, if the last one computes only some positions.
    finished = _head_numbers(config)
    if _freed_layer(config):
        finished += count_numbers(layer_parameters(model))
    return matrix + (2 if config.parallel.precision == "bf16-true" else 4) * finished


def _zero_states(config: RunConfig) -> _States:
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
    return _States(
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


def _zero3_states(config: RunConfig) -> _States:
    """Stage 3 gathers many layers into one array ahead of their use, and copies each parameter out.

    The array stays until the last of its parameters is used. One rank gathers nothing.
    """
    model, parallel = config.model, config.parallel
    world, numbers, size = parallel.world_size, count_parameters(model), _product_size(config)
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
    return _States(
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


def predict_memory(config: RunConfig, hardware: Hardware) -> Memory:
    """Returns the memory of one device at its peak.

    Args:
        config: with a strategy other than `auto`, and the accelerator of the hardware.
    """
    moments = _moments(config, scratch=_scratch_bytes(config, hardware))
    return _on(max(moments, key=lambda moment: moment.allocated_bytes), hardware)


def _scratch_bytes(config: RunConfig, hardware: Hardware) -> int:
    """Returns what a matrix product needs beside its result, in bytes per number of the result.

    oneDNN computes a product of bfloat16 numbers in float32, and converts the whole result at the
    end, on a CPU without instructions for bfloat16: one on which they are slower than float32.
    """
    peaks = hardware.peak_flops
    is_slower = peaks.get("bfloat16", math.inf) < peaks.get("float32", 0.0)
    is_half = config.parallel.precision.startswith("bf16")
    return 4 if config.parallel.accelerator == "cpu" and is_half and is_slower else 0


def _on(memory: "_Moment", hardware: Hardware) -> Memory:
    return Memory(
        **{name: getattr(memory, name) for name in _Moment.__dataclass_fields__},
        context=hardware.context_bytes,
        capacity=hardware.memory_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class _Moment:
    moment: str
    parameters: int
    optimizer: int
    gradients: int
    inputs: int
    gathered: int = 0
    activations: Mapping[str, int] = field(default_factory=dict)
    logits: int = 0
    communication: int = 0

    @property
    def allocated_bytes(self) -> int:
        named = self.parameters + self.gradients + self.optimizer + self.gathered
        named += self.logits + self.communication + self.inputs
        return named + sum(self.activations.values())


def _moments(config: RunConfig, *, scratch: int) -> tuple[_Moment, ...]:
    states, parallel = _states(config), config.parallel
    saved = saved_by_kind(config)
    saved_logits = saved.pop("logits")
    saved = {kind: size for kind, size in saved.items() if size}
    common: dict[str, Any] = {
        "parameters": states.parameters,
        "optimizer": states.optimizer,
        "inputs": _input_bytes(config),
    }
    accumulated = states.gradients if config.accumulate > 1 else 0
    previous = states.gradients if states.is_gradient_kept else accumulated
    # DDP's gradients are views of its buckets, which stay; so does an array of ZeRO-3.
    stays = parallel.strategy in ("ddp", "zero3")
    remaining = states.gradients if stays else accumulated
    copies = _copied_images(config)
    first = _Moment(
        **common,
        moment="forward pass of the first layer",
        gradients=previous,
        gathered=states.gathered
        - (config.model.num_layers - 1) * states.late_layer
        + states.gathered_layer,
        activations={"embedding": saved["embedding"]} if "embedding" in saved else {},
        communication=states.root_buffers + copies + states.kept_buffers,
    )
    layers = config.model.num_layers
    recomputes = parallel.activation_checkpointing != "off"
    if recomputes and (copied := _copied_layer(config)):
        saved["16-bit weights"] -= layers * copied
    of_last = _freed_layer(config) or saved["layers"] // layers
    last = _Moment(
        **common,
        moment="forward pass of the last layer",
        gradients=previous,
        gathered=states.gathered + states.gathered_layer,
        activations=saved | {"layers": saved["layers"] - of_last, "head": 0},
        communication=states.layer_buffers + copies + states.kept_buffers,
    )
    forward = _Moment(
        **common,
        moment="end of the forward pass",
        gradients=previous,
        gathered=states.gathered + states.last_layer,
        activations=saved,
        logits=saved_logits + _forward_logits(config),
        communication=copies + states.kept_buffers,
    )
    begin = _Moment(
        **common,
        moment="begin of the backward pass",
        gradients=remaining,
        gathered=states.gathered + states.gathered_layer,
        activations=saved,
        logits=saved_logits + _backward_logits(config),
        communication=states.kept_buffers,
    )
    head = _Moment(
        **common,
        moment="backward pass of the head",
        gradients=remaining + _new_head_gradients(config, scratch),
        gathered=states.gathered + states.gathered_layer,
        activations=saved,
        logits=_gradient_of_logits(config),
        communication=states.kept_buffers,
    )
    model, rows = config.model, config.batch_size * config.sequence_length
    number = 4 if parallel.precision == "32-true" else 2
    # Otherwise one moment stands for the last layer and the one before it.
    has_both = states.layer_shard > 0 and layers > 1
    backward_gathered = states.gathered - states.released_head

    def inside(name: str, finished: int, freed: int) -> _Moment:
        """Inside the backward pass of a layer, after that of `finished` others."""
        is_last = has_both and not finished
        return _Moment(
            **common,
            moment=name,
            gradients=remaining + _early_gradients(config),
            # That which computes, and the next one if there is one.
            gathered=backward_gathered
            - finished * states.released_layer
            + states.gathered_layer
            + (states.next_layer if layers - finished > 1 else 0),
            activations=saved
            | {"layers": saved["layers"] - freed}
            | {"gradients of a layer's results": _layer_gradients(config, is_last, scratch)},
            logits=saved_logits if keeps_gradients(config) else 0,
            communication=states.layer_gradients
            + (states.reduced_layer + states.layer_shard if finished else 0)
            + states.buffers
            + states.kept_buffers,
        )

    def layer_end(name: str, finished: int, freed: int) -> _Moment:
        """When a layer's gradients are copied to be reduced, after those of `finished` others."""
        return _Moment(
            **common,
            moment=name,
            gradients=remaining,
            # Of the next one: what computed is dropped before.
            gathered=backward_gathered
            - (finished + 1) * states.released_layer
            + (states.next_layer if layers - finished > 1 else 0),
            activations=saved
            | {"layers": saved["layers"] - freed}
            | {"gradients of a layer's results": 4 * number * rows * model.width},
            logits=saved_logits if keeps_gradients(config) else 0,
            communication=states.all_layer_gradients
            + states.reduced_layer
            + (finished + (states.reduced_layer > 0)) * states.layer_shard
            + states.buffers
            + states.kept_buffers,
        )

    def reduction(name: str, finished: int, freed: int) -> _Moment:
        """When a layer's gradients are reduced at once, after those of `finished` others."""
        return _Moment(
            **common,
            moment=name,
            gradients=remaining,
            gathered=states.gathered + (states.next_layer if layers - finished > 1 else 0),
            activations=saved
            | {"layers": saved["layers"] - freed}
            | {"gradients of a layer's results": number * rows * model.width},
            logits=saved_logits if keeps_gradients(config) else 0,
            communication=states.head_gradients
            + states.reduction
            + finished * states.layer_shard
            + states.kept_buffers,
        )

    in_layers = (
        list(_recomputed_layers(config, common, remaining, scratch))
        if recomputes
        else [
            inside("backward pass of the last layer", 0, _freed_layer(config)),
            layer_end("end of the last layer's backward pass", 0, saved["layers"] // layers),
        ]
    )
    if has_both and not recomputes:
        # The layer before works beside the reduction of the last one, whose activations are gone.
        in_layers[0] = inside("backward pass of the last layer", 0, 0)
        in_layers[1] = layer_end("end of the last layer's backward pass", 0, of_last)
        before = (saved["layers"] - of_last) // (layers - 1)
        in_layers += [
            inside("backward pass of the layer before the last", 1, of_last),
            layer_end(
                *("end of the backward pass of the layer before the last", 1, of_last + before)
            ),
        ]
    if states.next_layer and layers > 2 and parallel.accelerator == "cpu":
        # gloo receives the weights of the next layer in an array of its own, and copies them. The
        # layer that will use its weights now begins its backward pass, and that before is reduced.
        others = (saved["layers"] - of_last) // (layers - 1)
        in_layers += [
            _Moment(
                **common,
                moment="gather of a layer in the backward pass",
                gradients=remaining,
                gathered=states.gathered + states.gathered_layer + 2 * states.next_layer,
                activations=saved
                | {"layers": saved["layers"] - of_last - (finished - 1) * others}
                | {"gradients of a layer's results": number * rows * model.width},
                logits=saved_logits if keeps_gradients(config) else 0,
                communication=states.head_gradients
                + states.reduced_layer
                + finished * states.layer_shard
                + states.kept_buffers,
            )
            for finished in {1, layers - 2}
        ]
    end = _Moment(
        **common,
        moment="end of the backward pass",
        gradients=states.waiting_gradients or states.gradients,
        communication=states.root_gradients
        + states.kept_buffers
        + (states.buffers if states.waiting_gradients else 0),
    )
    step = _Moment(
        **common,
        moment="optimizer step",
        gradients=states.gradients,
        communication=states.step + states.kept_buffers,
    )
    if states.reduction and not states.reduced_layer and not recomputes:
        # FSDP1 reduces a layer when its backward pass is over.
        for finished in {0, 1, layers - 2, layers - 1} & set(range(layers)):
            freed = of_last + finished * ((saved["layers"] - of_last) // max(1, layers - 1))
            in_layers.append(reduction("reduction of a layer", finished, freed))
    feedforward = _forward_layers(config, common, previous, saved, scratch)
    moments = [first, last, *feedforward, forward, begin, *in_layers, end, step]
    if parallel.uses_deepspeed and states.buffers:
        # The first gradient that is ready makes DeepSpeed allocate its buckets.
        is_made = keeps_gradients(config)  # by the loss
        bucket = _Moment(
            **common,
            moment="reduction of the first gradients",
            gradients=remaining
            + (0 if is_made else _new_gradient_size(config) * _head_numbers(config)),
            activations=saved | {"head": 0},
            logits=saved_logits if is_made else 0,
            communication=states.buffers + states.kept_buffers,
        )
        moments.append(bucket)
    # A loss that keeps gradients has those of the head since the forward pass.
    return tuple(moments) if keeps_gradients(config) else (*moments, head)


def _recomputed_layers(
    config: RunConfig, common: Mapping[str, Any], remaining: int, scratch: int
) -> Iterator[_Moment]:
    """Yields moments in the backward pass of layers that are recomputed.

    What is alive changes linearly from the layer before the last to the second one, so these stand
    for all between them. The last one may compute only some positions, and the first one has no
    next one to gather.
    """
    layers = config.model.num_layers
    names = {0: "last layer", 1: "layer before the last", layers - 2: "second layer"}
    names = {layers - 1: "first layer"} | {n: name for n, name in names.items() if 0 <= n < layers}
    sizes = _RecomputedSizes.of(config)
    for finished, name in names.items():
        layer = _RecomputedLayer(config, common, remaining, scratch, sizes, finished, name)
        yield from layer.moments()


@dataclass(frozen=True, kw_only=True)
class _RecomputedSizes:
    """Bytes and numbers of a layer whose forward pass is computed again."""

    size: int  # of a number that a matrix product reads
    residual: int  # of a number between the layers
    norm: int  # of a number that a norm reads
    results: int  # that the recomputation makes and nothing kept, at all positions
    kept: Mapping[str, int]  # what the forward pass keeps of all layers, by kind
    kept_of_last: int  # what it keeps of the last layer,
    kept_of_other: int  # and of each other one
    logits: int

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        model, parallel, size = config.model, config.parallel, _product_size(config)
        layers, width = model.num_layers, model.width
        saved = saved_by_kind(config)
        logits = saved.pop("logits")
        kept = {kind: size for kind, size in saved.items() if size and kind != "head"}
        if "16-bit weights" in kept:
            # One layer is at work. The copy of the head is gone with its backward pass.
            kept["16-bit weights"] = _copied_layer(config) + _copied_patches(config)
        other = _added_layer_bytes(config)
        residual, norm = _sizes_between_products(config)
        input_bytes = residual * config.batch_size * config.sequence_length * width
        # Without a cast between them, the input of a layer is that of its norm.
        shared = input_bytes if norm == residual else 0
        # Recomputation ends at the input of the last product, whose kept result is never read.
        is_selective = parallel.activation_checkpointing == "selective"
        unused = size * config.batch_size * config.sequence_length * width if is_selective else 0
        return cls(
            size=size,
            residual=residual,
            norm=norm,
            results=layer_bytes(config) - (other - input_bytes) - shared + unused,
            kept=kept,
            kept_of_last=kept["layers"] - (layers - 1) * other,
            kept_of_other=other,
            logits=logits if keeps_gradients(config) else 0,
        )


@dataclass(frozen=True)
class _RecomputedLayer:
    """The backward pass of one layer that is recomputed, after that of `finished` later ones.

    In this order:

    1. The forward pass of the layer is computed again; all its results are there.
    2. The second matrix of the feed-forward: a product makes the gradient of its input from that of
       the layer's result, and another one that of the matrix.
    3. The activation makes the gradient of its input from that of its result.
    4. What is left of the results goes, one by one, down to the projection of queries, keys and
       values, which reads its input and the gradients of all three.
    5. If weights are sharded, the whole ones are dropped, and gradients are copied into one array
       to be reduced. It stays until the next layer is reduced.

    Most is alive in steps 2, 3, 4 and 5. Beside it, earlier layers keep their inputs; strategies
    that shard nothing have the gradients of later layers and the head, others shards of them.
    """

    config: RunConfig
    common: Mapping[str, Any]
    remaining: int  # gradients from before
    scratch: int
    sizes: _RecomputedSizes
    finished: int
    name: str

    def moments(self) -> Iterator[_Moment]:
        yield from self._feedforward()
        yield self._projection()
        if self._states.reduction:
            yield self._reduction()

    def _feedforward(self) -> Iterator[_Moment]:
        sizes, hidden, width = self.sizes, self.config.model.feedforward_width, self._width
        casts = sizes.size * width if sizes.residual != sizes.size else 0
        result = sizes.size * hidden + casts
        # ReLU keeps its result, which without dropout is also the input of the second matrix.
        activation = (2 if self._has_shared_input else 1) * sizes.size * hidden
        of_matrix = self._kept_size * width * hidden
        for results, gradients in (
            (result + self.scratch * hidden, 0),
            (result, self._new_matrix()),
            (activation, of_matrix),
        ):
            yield self._moment(
                "backward pass",
                gradients=gradients,
                results=results + sizes.residual * width,
                recomputed=sizes.results * self._rows // self._all_rows,
                communication=self._states.layer_gradients,
            )

    def _projection(self) -> _Moment:
        sizes, width = self.sizes, self._width
        layer_numbers = count_numbers(layer_parameters(self.config.model))
        of_matrix = self._new_size * 3 * width**2
        norm = sizes.norm if sizes.norm != sizes.residual else 0
        return self._moment(
            "end of the backward pass",
            gradients=self._kept_size * layer_numbers if self._is_whole else of_matrix,
            results=width * (4 * sizes.size + sizes.residual),
            recomputed=self._rows * width * (sizes.size + norm),
            communication=self._states.all_layer_gradients,
        )

    def _reduction(self) -> _Moment:
        states = self._states
        return self._moment(
            "reduction",
            gathered=self._earlier_gathered() - states.released_layer,
            results=self._width * self.sizes.residual,
            kept=self._kept(self.finished + 1),
            communication=states.head_gradients + states.reduction,
        )

    def _moment(
        self,
        name: str,
        *,
        gradients: int = 0,
        gathered: int | None = None,
        results: int,
        kept: dict[str, int] | None = None,
        recomputed: int | None = None,
        communication: int,
    ) -> _Moment:
        """Adds what is alive in all steps.

        Args:
            gradients: of the matrix at hand, or of the matrices of this layer that are done.
            gathered: whole weights; by default those of this layer and of the next one.
            results: gradients of the layer's results, for each position.
            kept: what forward passes kept and is still there; by default that of this layer too.
            recomputed: results of the recomputation that are still there.
            communication: whole gradients of sharded weights, and buffers.
        """
        states = self._states
        waiting = states.reduced_layer if self.finished else 0
        if gathered is None:
            gathered = self._earlier_gathered() + states.gathered_layer
        else:  # in a reduction, which has waited for the one before
            waiting = 0
        activations = self._kept(self.finished) if kept is None else kept
        activations |= {"gradients of a layer's results": self._rows * results}
        if recomputed is not None:
            activations["recomputed layer"] = recomputed
        return _Moment(
            **self.common,
            moment=f"{name} of the {self.name}",
            gradients=self.remaining + self._finished_gradients() + gradients,
            gathered=gathered,
            activations=activations,
            logits=self.sizes.logits,
            communication=communication
            + waiting
            + self.finished * states.layer_shard
            + states.buffers
            + states.kept_buffers,
        )

    def _earlier_gathered(self) -> int:
        """Returns the whole weights that are there beside those of this layer alone."""
        states = self._states
        is_first = self.finished == self.config.model.num_layers - 1
        gathered = states.gathered + (0 if is_first else states.next_layer)
        return gathered - states.released_head - self.finished * states.released_layer

    def _kept(self, finished: int) -> dict[str, int]:
        """Returns what the forward pass kept of all but the last `finished` layers."""
        kept = dict(self.sizes.kept)
        if finished:
            kept["layers"] -= self.sizes.kept_of_last + (finished - 1) * self.sizes.kept_of_other
        return kept

    def _finished_gradients(self) -> int:
        """Returns the whole gradients of the head and of finished layers, if they stay."""
        if not self._is_whole:
            return 0
        numbers = _head_numbers(self.config)
        numbers += self.finished * count_numbers(layer_parameters(self.config.model))
        return _size_of_gradients(self.config.parallel) * numbers

    def _new_matrix(self) -> int:
        """Returns the gradient of the second matrix as computed, or autocast's float32 copy.

        The copy is made when the input of the product is gone.
        """
        numbers, size = self._width * self.config.model.feedforward_width, self.sizes.size
        product = (min(self._new_size, size) + self.scratch) * numbers
        if self._new_size <= size:
            return product
        is_gone = not self._has_shared_input
        gone = size * self._rows * self.config.model.feedforward_width if is_gone else 0
        return max(product, self._new_size * numbers - gone)

    @property
    def _states(self) -> _States:
        return _states(self.config)

    @property
    def _width(self) -> int:
        return self.config.model.width

    @property
    def _all_rows(self) -> int:
        return self.config.batch_size * self.config.sequence_length

    @property
    def _rows(self) -> int:
        """Positions that the layer computes."""
        predicted = self.config.batch_size * count_predicted_positions(self.config)
        return self._all_rows if self.finished else predicted

    @property
    def _has_shared_input(self) -> bool:
        model = self.config.model
        return model.activation == "relu" and model.dropout == 0

    @property
    def _is_whole(self) -> bool:
        """Whether gradients stay as they are computed."""
        return self.config.parallel.strategy == "single" and self.config.accumulate == 1

    @property
    def _kept_size(self) -> int:
        return 4 if self._is_whole else 0

    @property
    def _new_size(self) -> int:
        """Bytes of a number of a gradient just computed, unless `layer_gradients` counts it."""
        return 0 if self._states.layer_gradients else _new_gradient_size(self.config)


def _forward_layers(
    config: RunConfig,
    common: Mapping[str, Any],
    previous: int,
    saved: Mapping[str, int],
    scratch: int,
) -> Iterator[_Moment]:
    """Yields moments of the forward pass, in the feed-forward of the last two layers.

    Beside what the layers keep, there is what this one has made and does not keep.
    """
    states, layers = _states(config), config.model.num_layers
    of_last = saved["layers"] - (layers - 1) * _added_layer_bytes(config)
    made = _made_in_feedforward(config, scratch)
    names = {0: "last layer", 1: "layer before the last"}
    for later in range(min(2, layers)):
        positions = config.sequence_length if later else count_predicted_positions(config)
        kept = saved["layers"] - (of_last if later else 0)
        yield _Moment(
            **common,
            moment=f"feed-forward of the {names[later]}",
            gradients=previous,
            gathered=states.gathered - later * states.late_layer + states.gathered_layer,
            activations={**saved, "layers": kept, "head": 0}
            | {"results inside a layer": config.batch_size * positions * made},
            communication=states.layer_buffer + _copied_images(config) + states.kept_buffers,
        )


def _made_in_feedforward(config: RunConfig, scratch: int) -> int:
    """Returns the bytes of a position that a feed-forward has beside what its layer keeps.

    The first product may need scratch memory; then the activation has its input and its result.
    What attention adds to the residual stays until the layer is done, and so does the result of a
    norm that autocast computes in float32, beside its copy.
    """
    model, size = config.model, _product_size(config)
    residual, norm = _sizes_between_products(config)
    match config.parallel.activation_checkpointing:
        case "full":  # keeps none of them, and neither their sum nor the norm's result
            width = size + residual + norm + (size if norm != size else 0)
            return width * model.width + (size + max(size, scratch)) * model.feedforward_width
        case "selective":  # keeps the results of products
            width = residual + norm + (size if norm != size else 0)
            return width * model.width + max(size, scratch) * model.feedforward_width
    # Without dropout ReLU keeps its result alone.
    is_input_kept = model.activation != "relu" or model.dropout > 0
    hidden = max(0, scratch - size) if is_input_kept else max(size, scratch)
    width = size + (norm if norm > residual else 0)
    return width * model.width + hidden * model.feedforward_width


def _sizes_between_products(config: RunConfig) -> tuple[int, int]:
    """Returns the bytes of a number between the layers, and of one that a norm reads."""
    parallel = config.parallel
    full = replace(config, parallel=replace(parallel, activation_checkpointing="full"))
    numbers = config.batch_size * config.sequence_length * config.model.width
    residual = saved_by_kind(full)["layers"] // (config.model.num_layers * numbers)
    is_float32 = parallel.accelerator == "cuda" and parallel.precision.endswith("mixed")
    return residual, 4 if is_float32 and not parallel.uses_deepspeed else residual


def _product_size(config: RunConfig) -> int:
    """Returns the bytes of a number that a matrix product reads."""
    return 4 if config.parallel.precision == "32-true" else 2


def _size_of_gradients(parallel: ParallelConfig) -> int:
    """Returns the bytes of a number of a gradient that the optimizer reads."""
    return 2 if parallel.precision == "bf16-true" else 4


def _copied_layer(config: RunConfig) -> int:
    """Returns autocast's 16-bit copies of a layer's matrices, under strategies that shard nothing.

    Lightning's autocast keeps no cache, so a matrix is copied for each use. The copy stays for the
    backward pass, but that of a checkpointed layer only from its recomputation on.
    """
    parallel, width = config.parallel, config.model.width
    if parallel.is_sharded or parallel.uses_deepspeed or not parallel.precision.endswith("mixed"):
        return 0
    return 2 * width * (4 * width + 2 * config.model.feedforward_width)


def _copied_patches(config: RunConfig) -> int:
    """Returns autocast's 16-bit copy of the matrix that embeds patches, likewise."""
    model = config.model
    if not _copied_layer(config) or model.patch_size is None:
        return 0
    return 2 * model.width * model.num_channels * model.patch_size**2


def _added_layer_bytes(config: RunConfig) -> int:
    """Returns what one more layer would keep, all of whose positions are computed."""
    deeper = replace(config, model=replace(config.model, num_layers=config.model.num_layers + 1))
    return saved_by_kind(deeper)["layers"] - saved_by_kind(config)["layers"]


def _freed_layer(config: RunConfig) -> int:
    """Returns what the last layer kept, if it computes only some positions.

    Without checkpointing the layer before it needs most: it computes all positions.
    """
    is_shorter = count_predicted_positions(config) < config.sequence_length
    is_first = config.model.num_layers == 1
    if not is_shorter or is_first or config.parallel.activation_checkpointing != "off":
        return 0
    others = (config.model.num_layers - 1) * layer_bytes(config)
    return max(0, saved_by_kind(config)["layers"] - others)


def _layer_gradients(config: RunConfig, is_last: bool, scratch: int) -> int:
    """Returns the gradients that are alive at the second matrix of a feed-forward.

    The last layer has them of the positions that it computes. They are those of the layer's result,
    of the activation's result and of its input.
    """
    model = config.model
    positions = count_predicted_positions(config) if is_last else config.sequence_length
    rows = config.batch_size * positions
    size = 4 if config.parallel.precision == "32-true" else 2
    # The product that makes the second of them comes first, and may need more.
    largest = max(2 * size, size + scratch)
    return rows * (largest * model.feedforward_width + size * model.width)


def _copied_images(config: RunConfig) -> int:
    """Returns the copies of a micro-batch that the forward pass has: FSDP2 casts what enters.

    They are the images in 16 bits, and in the order of their patches.
    """
    model, parallel = config.model, config.parallel
    is_cast = parallel.strategy in ("fsdp", "hsdp") and parallel.precision == "bf16-mixed"
    if model.image_size is None or not is_cast:
        return 0
    return 2 * 2 * config.batch_size * model.num_channels * model.image_size**2


def _forward_logits(config: RunConfig) -> int:
    """Returns what computing the loss needs beside what it keeps: logits, and a float32 copy.

    A loss that makes its gradients in the forward pass writes them over the logits.
    """
    rows = config.batch_size * count_predicted_positions(config)
    is_copied = config.parallel.precision != "32-true"
    copies = 6 if is_copied else 4
    return int(copies * min(rows, loss_rows(config))) * config.num_logits


def _backward_logits(config: RunConfig) -> int:
    """Returns the gradients of the log-probabilities and of the logits, in float32."""
    if keeps_gradients(config):
        return 0
    return 8 * config.batch_size * count_predicted_positions(config) * config.num_logits


def _gradient_of_logits(config: RunConfig) -> int:
    """Returns the gradient of the logits, as the products of the head read it."""
    size = 4 if config.parallel.precision == "32-true" else 2
    return size * config.batch_size * count_predicted_positions(config) * config.num_logits


def _input_bytes(config: RunConfig) -> int:
    """Returns a micro-batch, the table of positions, and the samples that are held in memory."""
    model, batch = config.model, config.batch_size
    size = 2 if config.parallel.precision == "bf16-true" else 4
    total = size * model.num_positions * model.width
    if model.image_size is not None:
        pixels = model.num_channels * model.image_size**2
        total += batch * (size * pixels + 8)
        if config.data.source == "synthetic":
            total += 4 * pixels  # the last of the samples that begin at each number
        elif config.data.source == "builtin":
            # Images of 8 x 8 pixels in float32, and labels in int64.
            total += sum(NUM_DIGITS[: model.num_classes]) * (8 * 8 * 4 + 8)
    else:
        positions = 2 * count_predicted_positions(config) if config.recipe == "bert" else 0
        total += 8 * batch * (config.sequence_length + (positions or config.sequence_length))
    if config.data.source == "synthetic":
        # Tokens and positions are int64; images are float32, and their labels int64.
        total += SYNTHETIC_NUMBERS * {"gpt": 8, "bert": 16, "vit": 12}[config.recipe]
    return total
