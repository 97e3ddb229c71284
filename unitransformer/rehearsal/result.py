"""The result of a rehearsal: memory by category, collectives, and the shards of each parameter."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from unitransformer.rehearsal.observer import Collective

# What ranks of a run exchange in each step, over gloo, beside what a rehearsal observes: the reason
# to stop of `unitransformer.training.stop`.
AGREEMENT, AGREEMENT_BYTES = "agreement to stop", 4


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a strategy divides one parameter over the ranks."""

    name: str
    shape: tuple[int, ...]
    placement: str  # such as "shard rows over 64" or "whole"
    rank_0_shape: tuple[int, ...]
    last_rank_shape: tuple[int, ...]
    padding: int  # numbers that FSDP2 adds in each gather, so that all shards are of one size


@dataclass(frozen=True, kw_only=True)
class CollectiveTotal:
    """Equal collectives of one step."""

    kind: str
    group: tuple[int, int]  # number of ranks, and the distance between two of them
    dtype: str
    calls: int
    num_bytes: int  # of the full tensors: reduced, gathered, or to be scattered
    padding_bytes: int


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What one optimizer step needs on rank 0."""

    world_size: int
    peak_bytes: int
    peak_place: str
    bytes_by_category: dict[str, int]
    collectives: list[CollectiveTotal]
    unobserved_bytes: dict[str, int]  # that a run sends beside `collectives`, by their name
    parameters: list[Sharding]


def describe_sharding(model: nn.Module) -> list[Sharding]:
    """Returns the shards of every parameter, of this rank and of the last one."""
    return [_describe(name, parameter) for name, parameter in model.named_parameters()]


def _describe(name: str, parameter: Tensor) -> Sharding:
    shape = tuple(parameter.shape)
    placement, first, last, padding = "whole", shape, shape, 0
    if isinstance(parameter, DTensor):
        first = tuple(parameter._local_tensor.shape)
        for axis, part in enumerate(parameter.placements):
            if isinstance(part, Shard):
                num_shards = parameter.device_mesh.size(axis)
                size, dim = shape[part.dim], part.dim
                placement = f"dimension {dim} over {num_shards}"
                rows = shard_rows(size, num_shards, num_shards - 1)
                last = (*shape[:dim], rows, *shape[dim + 1 :])
                padded = shard_rows(size, num_shards, 0) * num_shards
                padding = (padded - size) * prod(shape) // size
    return Sharding(
        name=name,
        shape=shape,
        placement=placement,
        rank_0_shape=first,
        last_rank_shape=last,
        padding=padding,
    )


def shard_rows(size: int, num_shards: int, rank: int) -> int:
    """Returns the rows of a rank's shard: as `torch.chunk` divides, the last ones may have none."""
    rows = -(-size // num_shards)
    return max(0, min(rows, size - rank * rows))


def sum_collectives(
    collectives: Iterable[Collective], padding_of: dict[int, int]
) -> list[CollectiveTotal]:
    """Adds up equal collectives.

    Args:
        padding_of: numbers in the full tensor of a gather -> how many of these are padding.
    """
    calls: Counter[tuple[str, tuple[int, int], str]] = Counter()
    sizes, padding = Counter(calls), Counter(calls)
    for item in collectives:
        distance = item.ranks[1] - item.ranks[0] if len(item.ranks) > 1 else 0
        key = (item.kind, (len(item.ranks), distance), item.dtype)
        calls[key] += 1
        sizes[key] += item.num_bytes
        if item.kind in ("all-gather", "reduce-scatter") and item.num_elements:
            added = padding_of.get(item.num_elements, 0)
            padding[key] += added * item.num_bytes // item.num_elements
    return [
        CollectiveTotal(
            kind=kind,
            group=group,
            dtype=dtype,
            calls=calls[kind, group, dtype],
            num_bytes=sizes[kind, group, dtype],
            padding_bytes=padding[kind, group, dtype],
        )
        for kind, group, dtype in calls
    ]


def group_padding(groups: Iterable[Iterable[tuple[torch.Size, int, int]]]) -> dict[int, int]:
    """Returns, for groups of (shape, dimension, number of shards): numbers gathered -> padding."""
    padding_of: dict[int, int] = {}
    for group in groups:
        total = padded = 0
        for shape, dim, num_shards in group:
            rows = shard_rows(shape[dim], num_shards, 0) * num_shards
            total += prod(shape)
            padded += prod(shape) // shape[dim] * rows
        padding_of[padded] = padded - total
    return padding_of
