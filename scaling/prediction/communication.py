"""Lists the collectives of one optimizer step, with exact bytes.

The bytes are those that a counter of torch's collectives sees from the fourth step on, when DDP has
its buckets and DeepSpeed knows the order of the modules. Tests compare them with real runs.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from scaling.prediction.parameters import (
    Parameter,
    count_numbers,
    count_padded_flat,
    count_padded_rows,
    embedding_parameters,
    gradient_order,
    head_parameters,
    is_matrix,
    layer_parameters,
    outer_parameters,
    size_of,
)
from unitransformer.config import ModelConfig, RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.machine.alpha_beta import Collective as Kind

Phase = Literal["forward", "backward", "optimizer"]
Group = Literal["world", "shard", "replicate"]

# Defaults of DistributedDataParallel: of its first bucket and of the others.
DDP_FIRST_BUCKET_BYTES, DDP_BUCKET_BYTES = 2**20, 25 * 2**20
# `unitransformer.parallel.deepspeed` gives DeepSpeed buckets of at most as many numbers.
ZERO_BUCKET, ZERO_BUCKET_MULTIPLE = 200_000_000, 1024
# Defaults of DeepSpeed's stage 3: smaller parameters stay whole, and a parameter stays gathered if
# it is used again before so many numbers of other parameters.
PERSISTENT_NUMBERS, REUSE_NUMBERS = 100_000, 1_000_000_000
# Of `unitransformer.training.stop`: the reason to stop, an int32, over gloo.
AGREEMENT, AGREEMENT_BYTES = "agreement to stop", 4


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Equal calls of one collective in one optimizer step."""

    kind: Kind
    of: str  # what is sent
    phase: Phase
    group: Group
    ranks: int  # of the group
    within_node: bool  # all ranks of the group are on one node
    bytes: int  # of one call: the whole array, with its padding, as nccl-tests counts it
    padding_bytes: int = 0  # of `bytes`, because shards must be of equal size
    calls: int = 1

    @property
    def total_bytes(self) -> int:
        return self.bytes * self.calls


@functools.lru_cache(maxsize=4096)
def collectives_of_step(config: RunConfig, *, node_size: int) -> tuple[Collective, ...]:
    """Returns the collectives of one optimizer step of a rank, in their order by phase.

    Args:
        config: with a strategy other than `auto`.
        node_size: devices of a node.
    """
    if config.parallel.world_size == 1:
        return ()
    step = _Step(config, node_size)
    match config.parallel.strategy:
        case "auto":
            raise ValueError("strategy is auto; choose one before its collectives are counted")
        case "single":
            return ()
        case "ddp":
            found = step.ddp()
        case "fsdp" | "hsdp":
            found = step.fsdp2()
        case "fsdp1":
            found = step.fsdp1()
        case "zero1" | "zero2":
            found = step.zero()
        case "zero3":
            found = step.zero3()
        case unknown:
            assert_never(unknown)
    agreement = step.make("all_reduce", AGREEMENT, "optimizer", AGREEMENT_BYTES)
    return (*found, agreement)


def weight_size(config: RunConfig) -> int:
    """Returns the bytes of a number in which weights are gathered, and products take them."""
    return 4 if config.parallel.precision == "32-true" else 2


def sum_size(config: RunConfig) -> int:
    """Returns the bytes of a number in which gradients are summed, except by DeepSpeed."""
    return 2 if config.parallel.precision == "bf16-true" else 4


@dataclass(frozen=True)
class _Step:
    config: RunConfig
    node_size: int

    @property
    def number(self) -> int:
        return weight_size(self.config)

    @property
    def sum_number(self) -> int:
        return sum_size(self.config)

    def make(
        self,
        kind: Kind,
        of: str,
        phase: Phase,
        size: int,
        *,
        group: Group = "world",
        padding: int = 0,
        calls: int = 1,
    ) -> Collective:
        parallel = self.config.parallel
        ranks = {
            "world": parallel.world_size,
            "shard": parallel.devices,
            "replicate": parallel.num_nodes,
        }[group]
        # The ranks of a replicate group are one of each node.
        span = parallel.devices if group == "shard" else parallel.world_size
        return Collective(
            kind=kind,
            of=of,
            phase=phase,
            group=group,
            ranks=ranks,
            within_node=span <= self.node_size,
            bytes=size,
            padding_bytes=padding,
            calls=calls,
        )

    def ddp(self) -> Iterator[Collective]:
        buckets = _ddp_buckets(self.config.model, self.sum_number)
        for index, size in enumerate(buckets, start=1):
            name = f"gradients, bucket {index} of {len(buckets)}"
            yield self.make("all_reduce", name, "backward", size)

    def fsdp2(self) -> Iterator[Collective]:
        config, model = self.config, self.config.model
        is_hybrid = config.parallel.strategy == "hsdp"
        ranks = config.parallel.devices if is_hybrid else config.parallel.world_size
        group: Group = "shard" if is_hybrid else "world"
        units = [
            ("embedding and head", outer_parameters(model), 1),
            ("layer", layer_parameters(model), model.num_layers),
        ]
        for name, parameters, count in units:
            padded, calls = count_padded_rows(parameters, ranks), count * config.accumulate
            extra = padded - count_numbers(parameters)
            if ranks > 1:
                # The root is not resharded after the forward pass, so the backward pass has it.
                for phase in ("forward", "backward") if name == "layer" else ("forward",):
                    size, padding = padded * self.number, extra * self.number
                    yield self.make(
                        *("all_gather", name, phase, size),
                        group=group,
                        padding=padding,
                        calls=calls,
                    )
                yield self.make(
                    *("reduce_scatter", f"gradients of {name}", "backward"),
                    padded * self.sum_number,
                    group=group,
                    padding=extra * self.sum_number,
                    calls=calls,
                )
            if is_hybrid:  # also among the replicas of a single node, which is one
                shard = padded // ranks * self.sum_number
                yield self.make(
                    *("all_reduce", f"gradients of {name}", "backward", shard),
                    group="replicate",
                    padding=extra * self.sum_number // ranks,
                    calls=calls,
                )
        if ranks > 1 and config.optimizer.clip_norm:
            norms = len(gradient_order(model)) * self.sum_number  # a number for each parameter
            yield self.make("all_reduce", "norms of gradients", "optimizer", norms, group=group)

    def fsdp1(self) -> Iterator[Collective]:
        config, model = self.config, self.config.model
        ranks = config.parallel.world_size
        units = [
            ("embedding and head", outer_parameters(model), 1),
            ("layer", layer_parameters(model), model.num_layers),
        ]
        for name, parameters, count in units:
            plain = count_numbers(parameters)
            padded, calls = math.ceil(plain / ranks) * ranks, count * config.accumulate
            extra = padded - plain
            for phase in ("forward", "backward") if name == "layer" else ("forward",):
                size, padding = padded * self.number, extra * self.number
                yield self.make("all_gather", name, phase, size, padding=padding, calls=calls)
            yield self.make(
                *("reduce_scatter", f"gradients of {name}", "backward"),
                padded * self.sum_number,
                padding=extra * self.sum_number,
                calls=count,
            )
        if config.optimizer.clip_norm:
            yield self.make("all_reduce", "norm of gradients", "optimizer", 4)
        if config.parallel.precision == "16-mixed":
            yield self.make("all_reduce", "overflow of gradients", "optimizer", 4)

    def zero(self) -> Iterator[Collective]:
        """Stages 1 and 2 reduce whole gradients and gather the updated weights."""
        config = self.config
        is_each = config.parallel.strategy == "zero2"  # stage 1 adds micro-batches up first
        repeats = config.accumulate if is_each else 1
        for bucket in _zero_buckets(config.model, _zero_bucket(config)):
            size = sum(size_of(parameter) * times for parameter, times in bucket) * self.number
            yield self.make("all_reduce", "gradients", "backward", size, calls=repeats)
        yield from self._overflow()
        yield self.make("all_reduce", "norm of gradients", "optimizer", 4, calls=2)
        # Each of the two groups of AdamW is one array, of which each rank updates a share.
        multiple = 2 * config.parallel.world_size
        for name, plain in _optimizer_groups(config.model):
            padded = math.ceil(plain / multiple) * multiple
            yield from self._split(f"weights of {name}", padded, padded - plain)

    def _split(self, name: str, padded: int, extra: int) -> Iterator[Collective]:
        """Yields the gathers of an array, in parts that are not larger than a bucket."""
        ranks = self.config.parallel.world_size
        parts = max(1, padded // _zero_bucket(self.config))
        share = padded // ranks // parts
        share -= share % 2  # DeepSpeed aligns its parts
        sizes = [share * ranks] * (parts - 1)
        sizes.append(padded - sum(sizes))
        for size in dict.fromkeys(sizes):
            yield self.make(
                *("all_gather", name, "optimizer", size * self.number),
                padding=extra * self.number if size == sizes[-1] else 0,
                calls=sizes.count(size),
            )

    def zero3(self) -> Iterator[Collective]:
        config, model = self.config, self.config.model
        ranks, repeats = config.parallel.world_size, config.accumulate
        for name, parameters, phase, calls in _zero3_gathers(model):
            large = tuple(p for p in parameters if size_of(p) > PERSISTENT_NUMBERS)
            if not large:
                continue
            padded = count_padded_flat(large, ranks)
            extra = padded - count_numbers(large)
            yield self.make(
                *("all_gather", name, phase, padded * self.number),
                padding=extra * self.number,
                calls=calls * repeats,
            )
        for bucket in _zero_buckets(model, _zero_bucket(config)):
            padded = sum(count_padded_flat((p,), ranks) * times for p, times in bucket)
            extra = padded - sum(size_of(p) * times for p, times in bucket)
            yield self.make(
                *("reduce_scatter", "gradients", "backward", padded * self.number),
                padding=extra * self.number,
                calls=repeats,
            )
        if config.parallel.precision == "16-mixed":
            yield from self._overflow()
        yield self.make("all_reduce", "norm of gradients", "optimizer", 8, calls=2)
        for size, calls in small_sizes(model):
            padded = math.ceil(size / ranks) * ranks
            yield self.make(
                *("all_gather", "a small parameter", "optimizer", padded * self.number),
                padding=(padded - size) * self.number,
                calls=calls,
            )

    def _overflow(self) -> Iterator[Collective]:
        if self.config.parallel.precision != "32-true":
            yield self.make("all_reduce", "overflow of gradients", "optimizer", 1)


@functools.lru_cache(maxsize=256)
def _ddp_buckets(model: ModelConfig, number: int) -> tuple[int, ...]:
    """Returns the bytes of DDP's buckets, each closed by the gradient that fills it.

    `compute_bucket_assignment_by_size` of torch/csrc/distributed/c10d/reducer.cpp.
    """
    buckets: list[int] = []
    size = 0
    for parameter in gradient_order(model):
        size += size_of(parameter) * number
        if size >= (DDP_BUCKET_BYTES if buckets else DDP_FIRST_BUCKET_BYTES):
            buckets.append(size)
            size = 0
    return (*buckets, size) if size else tuple(buckets)


def _zero_bucket(config: RunConfig) -> int:
    """Returns the numbers of a bucket, as `unitransformer.parallel.deepspeed` sets them."""
    total, multiple = count_parameters(config.model), ZERO_BUCKET_MULTIPLE
    return min(ZERO_BUCKET, math.ceil(total / multiple) * multiple)


@functools.lru_cache(maxsize=256)
def _zero_buckets(model: ModelConfig, limit: int) -> tuple[tuple[tuple[Parameter, int], ...], ...]:
    """Returns the gradients that DeepSpeed reduces together, before one more would be too many.

    A bucket is its distinct parameters, each with the number of layers that have it there.
    """
    buckets: list[dict[Parameter, int]] = [{}]
    numbers = 0
    for parameter in gradient_order(model):
        size = size_of(parameter)
        if buckets[-1] and numbers + size > limit:
            buckets.append({})
            numbers = 0
        buckets[-1][parameter] = buckets[-1].get(parameter, 0) + 1
        numbers += size
    return tuple(tuple(bucket.items()) for bucket in buckets)


@functools.lru_cache(maxsize=256)
def _optimizer_groups(model: ModelConfig) -> tuple[tuple[str, int], ...]:
    """Returns the numbers of the two groups of AdamW."""
    order = gradient_order(model)
    matrices = count_numbers(parameter for parameter in order if is_matrix(parameter))
    return ("matrices", matrices), ("vectors", count_numbers(order) - matrices)


@functools.lru_cache(maxsize=256)
def small_sizes(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Returns the sizes of parameters that ZeRO-3 keeps whole, and how many there are of each."""
    sizes = map(size_of, gradient_order(model))
    return tuple(Counter(size for size in sizes if size <= PERSISTENT_NUMBERS).items())


@functools.lru_cache(maxsize=256)
def _zero3_gathers(
    model: ModelConfig,
) -> tuple[tuple[str, tuple[Parameter, ...], Phase, int], ...]:
    """Returns what is gathered in a micro-batch: name, parameters, phase and number of gathers.

    A module's parameters are freed after it, unless one of the next modules uses them again before
    `REUSE_NUMBERS` other numbers (`PartitionedParameterCoordinator` of DeepSpeed 0.19).
    """
    embedding, last = embedding_parameters(model), head_parameters(model)
    norm = tuple(p for p in last if p[0].startswith("final_norm"))
    head = tuple(p for p in last if p not in norm)
    # A tied head uses the matrix of the embedding.
    layers = [(f"layer {i}", layer_parameters(model)) for i in range(model.num_layers)]
    forward = [("embedding", embedding), *layers, ("norm", norm), ("head", head)]
    if model.tied_head:
        forward[-1] = ("embedding", (*embedding, *head))
    whole = ("whole", ())  # hooks of the outermost module
    order = [whole, *forward, whole, *reversed(forward)]
    sizes = [count_numbers(parameters) for _, parameters in order]
    gathers: dict[tuple[str, Phase], int] = {}
    gathered: set[str] = set()
    for step, (name, _) in enumerate(order):
        if name == "whole":
            continue
        if name not in gathered:
            phase: Phase = "forward" if step <= len(forward) else "backward"
            kind = "layer" if name.startswith("layer") else name
            gathers[kind, phase] = gathers.get((kind, phase), 0) + 1
            gathered.add(name)
        if not _is_used_soon(name, order[step + 1 :], sizes[step + 1 :]):
            gathered.remove(name)
    parts = {"embedding": embedding, "layer": layer_parameters(model), "head": head}
    return tuple(
        (kind, parts[kind], phase, calls)
        for (kind, phase), calls in gathers.items()
        if kind in parts
    )


def _is_used_soon(name: str, modules: Sequence[tuple[str, object]], sizes: Sequence[int]) -> bool:
    traversed = 0
    for (module, _), size in zip(modules, sizes, strict=True):
        if traversed >= REUSE_NUMBERS:
            return False
        # DeepSpeed looks into submodules only if it frees a layer.
        is_layer = name.startswith("layer")
        if module == name or (module == "whole" and is_layer):
            return True
        traversed += size if is_layer or not module.startswith("layer") else 0
    return False
