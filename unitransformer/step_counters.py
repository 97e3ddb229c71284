"""A config in, the counters of one of its optimizer steps on a CPU out, for the rank that asks."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch._dynamo.utils import get_compilation_metrics

from unitransformer.config import RunConfig
from unitransformer.data.datamodule import DataModule
from unitransformer.data.sources import load_source
from unitransformer.profiling.step_events import StepEvent, module_names
from unitransformer.profiling.tensor_bytes import PeakTensorBytes, find_live_tensors
from unitransformer.training.module import TrainingModule
from unitransformer.training.trainer import build_trainer

# DDP has found its buckets by then, and DeepSpeed the order of its modules.
MEASURED = 3  # counted from 0

_KINDS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::broadcast_": "broadcast",
    "c10d::reduce_": "reduce",
    "c10d::alltoall_": "all_to_all",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::barrier": "barrier",
}

_ITEM_BYTES = {torch.float64: 8, torch.int64: 8, torch.float32: 4, torch.int32: 4}

_ITEM_BYTES |= {torch.bfloat16: 2, torch.float16: 2, torch.uint8: 1, torch.int8: 1, torch.bool: 1}


class CountStep(pl.Callback):
    """Counts optimizer step `MEASURED` of a run, and watches the one before it."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._first = MEASURED * config.accumulate  # micro-batch
        self._ignored = find_live_tensors()  # of whatever this process did before
        self._peak: PeakTensorBytes | None = None
        self.counters: dict[str, dict[str, int]] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self._first - self.config.accumulate:
            self._peak = PeakTensorBytes(
                module=pl_module,
                optimizers=trainer.optimizers,
                by_module=self.config.parallel.compile == "off",
                ignored=self._ignored,
            )
            self._peak.__enter__()
        elif batch_idx == self._first:
            assert self._peak is not None
            self._peak.begin()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if batch_idx != self._first + self.config.accumulate - 1:
            return
        assert self._peak is not None
        self._peak.__exit__(None, None, None)
        self.counters = count_events(self._peak.events, self.config.parallel.world_size)
        self.counters["peak_bytes"] = self._peak.by_location


def count_run(config: RunConfig, *, run_dir: Path) -> dict[str, dict[str, int]]:
    """Train a few steps of `config` on synthetic data and count one; every rank has to call this.

    The counters of this rank, named as in `counters.NAMES`.
    """
    steps = MEASURED + 1
    config = replace(
        config,
        max_steps=steps,
        data=replace(config.data, source="synthetic"),
        optimizer=replace(config.optimizer, schedule_steps=steps),
    )
    count = CountStep(config)
    module = TrainingModule(config)
    parameters = count_parameters(module)
    trainer = build_trainer(config, device="cpu", run_dir=run_dir, callbacks=[count], launch=0)
    trainer.limit_val_batches = 0
    trainer.fit(module, datamodule=DataModule(config, load_source(config)))
    return {"parameters": parameters, **count_graphs(), **count.counters}


def count_parameters(module: TrainingModule) -> dict[str, int]:
    """Numbers that are trained, by the module that holds them; before they are divided."""
    names = module_names(module)
    return _without_zeros(
        {
            names[id(part)]: sum(p.numel() for p in part.parameters(recurse=False))
            for part in module.modules()
            if id(part) in names
        }
    )


def count_events(events: Iterable[StepEvent], world_size: int) -> dict[str, dict[str, int]]:
    """Operators, FLOPs and collectives of a step.

    An operator is what torch's dispatcher was asked for, those that another one asks for too. A
    collective's bytes are those of the whole: what is reduced, what has been gathered, what will be
    scattered. Over n ranks a ring sends 2(n-1)/n of an all-reduce's from each rank, and (n-1)/n of
    a gather's or scatter's (nccl-tests, doc/PERFORMANCE.md).
    """
    flops, operators, names = Counter[str](), Counter[str](), Counter[str]()
    calls, sizes = Counter[str](), Counter[str]()
    for event in events:
        if event.name.startswith("aten::"):
            operators[event.location] += 1
            names[event.name] += 1
            flops[event.location] += matmul_flops(event)
        elif event.name.startswith("c10d::"):
            kind = _KINDS.get(event.name, event.name)
            calls[f"{kind} in {event.location}"] += 1
            sizes[f"{kind} in {event.location}"] += _collective_bytes(event, world_size)
    return {
        "flops": _without_zeros(flops),
        "operators": dict(operators),
        "operator_names": dict(names),
        "collective_calls": dict(calls),
        "collective_bytes": dict(sizes),
    }


def matmul_flops(event: StepEvent) -> int:
    """FLOPs of a matrix multiplication or of attention, 0 of anything else.

    A multiply-add is two. Attention's backward pass counts twice its forward, without what a fused
    one computes again; a causal mask halves nothing.
    """
    match event.name:
        case "aten::mm" | "aten::bmm":
            left, right = _sizes(event.inputs[0]), _sizes(event.inputs[1])
        case "aten::addmm" | "aten::baddbmm":
            left, right = _sizes(event.inputs[1]), _sizes(event.inputs[2])
        case "aten::_scaled_dot_product_flash_attention_for_cpu":
            return _attention_flops(event.inputs[0], event.inputs[1])
        case "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
            return 2 * _attention_flops(event.inputs[1], event.inputs[2])
        case _:
            return 0
    batch = left[0] if len(left) == 3 else 1
    return int(2 * batch * left[-2] * left[-1] * right[-1])


def _attention_flops(query: Any, key: Any) -> int:
    batch, heads, asked, width = _sizes(query)
    return int(4 * batch * heads * asked * _sizes(key)[2] * width)


def _sizes(tensor: Any) -> list[int]:
    return list(tensor.sizes)


def _collective_bytes(event: StepEvent, world_size: int) -> int:
    if event.name == "c10d::allgather_":  # the profiler does not look into its list of lists
        return world_size * _num_bytes(event.inputs[1])
    # Outputs come first; of a scatter the inputs are the whole.
    is_scatter = event.name in ("c10d::_reduce_scatter_base_", "c10d::reduce_scatter_tensor_")
    return _num_bytes(event.inputs[1 if is_scatter else 0])


def _num_bytes(tensors: Any) -> int:
    if isinstance(tensors, list | tuple):
        return sum(_num_bytes(tensor) for tensor in tensors)
    count = 1
    for size in tensors.sizes:
        count *= size
    return int(count * _ITEM_BYTES[tensors.dtype])


def count_graphs() -> dict[str, dict[str, int]]:
    """What torch.compile has made in this process so far, by the code it has read."""
    graphs, breaks, recompiles = Counter[str](), Counter[str](), Counter[str]()
    for metrics in get_compilation_metrics():
        if metrics.co_filename is None:
            continue  # the backward pass of a graph that is counted already
        code = f"{Path(metrics.co_filename).name}:{metrics.co_firstlineno}"
        place = f"{code} {metrics.co_name}"
        graphs[place] += 1
        recompiles[place] += bool(metrics.recompile_reason)
    for reason, number in torch._dynamo.utils.counters["graph_break"].items():
        breaks[reason.splitlines()[0]] += number
    return {
        "graphs": dict(graphs),
        "graph_breaks": dict(breaks),
        "recompiles": _without_zeros(recompiles),
    }


def _without_zeros(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


Counters = Mapping[str, Mapping[str, int]]  # counter -> place -> count

PLACES_SHOWN = 4  # of those that changed, in a message

NAMES = (
    "parameters",
    "flops",
    "operators",  # by module
    "operator_names",  # the same ones by name
    "collective_calls",
    "collective_bytes",
    "graphs",
    "graph_breaks",
    "recompiles",
    "peak_bytes",  # at the instant of the peak, by the module that allocated them
)


def differences(before: Counters, now: Counters) -> list[str]:
    """A line for each counter that changed: how much, by how many percent, and where most."""
    return [
        _difference(name, before.get(name, {}), now.get(name, {}))
        for name in sorted({*before, *now})
        if before.get(name, {}) != now.get(name, {})
    ]


def _difference(name: str, before: Mapping[str, int], now: Mapping[str, int]) -> str:
    old, new = sum(before.values()), sum(now.values())
    changes = {place: now.get(place, 0) - before.get(place, 0) for place in {*before, *now}}
    changed = sorted(place for place in changes if changes[place])
    largest = sorted(changed, key=lambda place: -abs(changes[place]))
    where = ", ".join(f"{place} {changes[place]:+,}" for place in largest[:PLACES_SHOWN])
    more = len(largest) - PLACES_SHOWN
    rest = f" and {more} more places" if more > 0 else ""
    share = f", {(new - old) / old:+.2%}" if old else ""
    verdict = "grew" if new > old else "shrank" if new < old else "moved"
    return f"{name} {verdict}: {old:,} -> {new:,} ({new - old:+,}{share}) at {where}{rest}"


def write_counters(counters: Counters, path: Path) -> None:
    """Sorted, a number a line: a change of one count is a diff of one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(counters, indent=1, sort_keys=True) + "\n")


def load_counters(path: Path) -> dict[str, dict[str, int]]:
    """What `write_counters` wrote.

    Raises:
        ValueError: a file that is no such thing, or has another counter than these.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or set(found) - set(NAMES):
        raise ValueError(f"{path} holds other counters than {', '.join(NAMES)}; write it anew")
    for name, places in found.items():
        for place, count in places.items():
            if type(count) is not int:
                raise ValueError(f"{path}: {name} at {place} is {count!r}, no whole number")
    return found
