"""Prints what `--rehearse N` found: whether it builds, memory, collectives and shards."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tabulate import tabulate

from recipes.options import ParsedCommand, build_config
from unitransformer.config import Accelerator, RunConfig, to_dict
from unitransformer.costs.memory import choose_strategy, format_gib
from unitransformer.files import write_atomically
from unitransformer.record.units import format_count
from unitransformer.rehearsal.rehearse import RehearsalFailed, check_rehearsal, rehearse
from unitransformer.rehearsal.result import CollectiveTotal, Rehearsal, Sharding

GPUS_PER_NODE = 8  # where --devices gives no other number
MAX_RANKS = 16_384
TENSORS = {
    "cuda": "fake tensors on the CPU, with the operators that a GPU chooses",
    "cpu": "fake tensors on the CPU",
}


def resolve_rehearsal(command: ParsedCommand) -> tuple[RunConfig, str]:
    """Returns the config of `--rehearse N` and the reason for its strategy.

    Raises:
        ValueError: ranks that nodes do not divide, or what cannot be rehearsed.
    """
    options = command.options
    num_ranks = options.rehearse
    assert num_ranks is not None
    if not 1 <= num_ranks <= MAX_RANKS:
        raise ValueError(f"rehearse is {num_ranks}; it must be a number of ranks, 1 to {MAX_RANKS}")
    devices = min(GPUS_PER_NODE, num_ranks) if options.devices is None else options.devices
    if devices < 1 or num_ranks % devices:
        raise ValueError(
            f"rehearse is {num_ranks} ranks, which nodes of {devices} do not divide; give the "
            f"ranks per node with --devices, or rehearse {max(1, num_ranks // devices) * devices}"
        )
    num_nodes = num_ranks // devices
    if options.num_nodes not in (None, num_nodes):
        raise ValueError(
            f"num-nodes is {options.num_nodes}, and {num_ranks} ranks in nodes of {devices} are "
            f"{num_nodes}; leave --num-nodes out"
        )
    on_cpu = options.accelerator == "cpu"
    defaults = command.preset.cpu if on_cpu else command.preset.cuda
    config = build_config(command, defaults=defaults, devices=devices, num_nodes=num_nodes)
    accelerator: Accelerator = "cpu" if on_cpu else "cuda"
    config = replace(config, parallel=replace(config.parallel, accelerator=accelerator))
    config, reason = choose_strategy(config, None)
    check_rehearsal(config)
    return config, reason


def run_rehearsal(command: ParsedCommand) -> int:
    """Rehearses a command line and prints the result; returns the exit code."""
    options = command.options
    config, reason = resolve_rehearsal(command)
    if options.strategy == "auto":
        print(f"strategy {config.parallel.strategy}: {reason}", flush=True)
    ranks = f"{config.recipe} {config.size} with {config.parallel.strategy} over " + format_count(
        config.parallel.world_size, "rank"
    )
    try:
        result = rehearse(config)
    except RehearsalFailed as failure:
        _write(options.json, {"builds": False, "error": str(failure), "config": to_dict(config)})
        reason = str(failure).strip().splitlines()[0]
        print(f"error: {ranks} does not build: {reason}", file=sys.stderr)
        return 1
    print("\n".join(_lines(config, result, ranks)), flush=True)
    _write(options.json, _as_json(config, result))
    return 0


def _as_json(config: RunConfig, result: Rehearsal) -> dict[str, object]:
    return {
        "builds": True,
        "torch": torch.__version__,
        "tensors": TENSORS[config.parallel.accelerator],
        "config": to_dict(config),
        **asdict(result),
    }


def _write(path: Path | None, values: dict[str, object]) -> None:
    if path is not None:
        write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())


def _lines(config: RunConfig, result: Rehearsal, ranks: str) -> list[str]:
    parallel = config.parallel
    nodes = format_count(parallel.num_nodes, "node")
    layers = f" of {config.model.num_layers}" if "of layer" in result.peak_place else ""
    memory = [
        (name, _size(size), f"{size:,}") for name, size in result.bytes_by_category.items() if size
    ]
    memory.append(("all", format_gib(result.peak_bytes), f"{result.peak_bytes:,}"))
    return [
        f"{ranks} builds.",
        f"Each rank needs at most {format_gib(result.peak_bytes)}, {result.peak_place}{layers}.",
        _communication(result.collectives),
        "",
        tabulate(memory, ("memory at the peak", "", "bytes"), colalign=("left", "right", "right")),
        "",
        *_collective_table(result.collectives, parallel.num_nodes, parallel.devices),
        _shard_table(result.parameters, parallel.world_size),
        "",
        f"rehearsed  rank 0 of {parallel.world_size:,}, {nodes} of {parallel.devices}; global "
        f"batch {config.global_batch_size:,}; {parallel.precision}",
        f"tensors    {TENSORS[parallel.accelerator]}; torch {torch.__version__}",
        "not in it  the GPU's context, buffers of NCCL and cuBLAS, fragmentation"
        + "".join(f", {n} ({size} bytes a step)" for n, size in result.unobserved_bytes.items()),
    ]


def _communication(collectives: Sequence[CollectiveTotal]) -> str:
    if not collectives:
        return "A step communicates nothing."
    calls = sum(item.calls for item in collectives)
    parts = [
        f"{format_count(item.calls, item.kind)} of {_size(item.num_bytes)}"
        for item in sorted(collectives, key=lambda item: -item.num_bytes)
    ]
    return f"A step has {format_count(calls, 'collective')}: {', '.join(parts)} in all."


def _size(num_bytes: int) -> str:
    return format_gib(num_bytes) if num_bytes >= 2**20 else f"{num_bytes:,} bytes"


def _collective_table(
    collectives: Sequence[CollectiveTotal], num_nodes: int, devices: int
) -> list[str]:
    if not collectives:
        return []
    rows = [
        (
            item.kind,
            _group(item.group, num_nodes, devices),
            item.dtype,
            f"{item.calls:,}",
            f"{item.num_bytes:,}",
            f"{item.padding_bytes:,}",
        )
        for item in collectives
    ]
    headers = ("collectives of a step", "among", "dtype", "calls", "bytes", "of which padding")
    align = ("left", "left", "left", "right", "right", "right")
    return [tabulate(rows, headers, colalign=align, disable_numparse=True), ""]


def _group(group: tuple[int, int], num_nodes: int, devices: int) -> str:
    size, distance = group
    if size == num_nodes * devices:
        return f"all {size:,} ranks"
    if distance == 1:
        return f"{size:,} ranks of a node"
    return f"one rank of each of {size:,} nodes"


def _shard_table(parameters: Iterable[Sharding], world_size: int) -> str:
    """Returns one row for equal parameters of consecutive layers."""
    rows: dict[tuple[object, ...], list[int]] = {}
    for item in parameters:
        layer = re.search(r"layers\.(\d+)\.", item.name)
        name = item.name if layer is None else item.name.replace(layer[0], "layers.*.")
        key = (name, item.shape, item.placement, item.rank_0_shape, item.last_rank_shape)
        rows.setdefault((*key, item.padding), []).append(int(layer[1]) if layer else 0)
    table = [
        (
            name if len(layers) == 1 else f"{name} x {len(layers)}",
            _shape(shape),
            placement,
            _shape(first),
            _shape(last),
            f"{padding:,}",
        )
        for (name, shape, placement, first, last, padding), layers in rows.items()
    ]
    headers = ("parameter", "shape", "divided", "on rank 0", f"on rank {world_size - 1:,}")
    return tabulate(table, (*headers, "padding"), disable_numparse=True)


def _shape(shape: object) -> str:
    assert isinstance(shape, tuple)
    return " x ".join(f"{size:,}" for size in shape)
