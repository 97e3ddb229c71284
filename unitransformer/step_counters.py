"""Counts one optimizer step on a CPU: parameters, FLOPs, operators, collectives, graphs, bytes.

The counts are exact and do not depend on timing, so tests compare them with stored baselines, and
`python -m scaling bisect` those of two revisions. As a script it reads a question in JSON from
standard input, {"recipe": "gpt", "arguments": ["--devices", "2"]}, and prints the counters of that
command line, or {"failure": "..."}. It can be run with the code of an older revision in PYTHONPATH.
"""

import contextlib
import importlib
import io
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

# isort: off
import unitransformer  # noqa: F401  (before lightning: repairs torchvision beside a CPU torch)
import lightning.pytorch as pl
import torch
from torch import nn
from torch._dynamo.utils import get_compilation_metrics
from torch.autograd.profiler import record_function
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

# isort: on
from unitransformer.config import RunConfig, from_dict
from unitransformer.data.datamodule import DataModule
from unitransformer.data.sources import load_source
from unitransformer.launch.devices import set_up_process
from unitransformer.launch.environment import process_rank
from unitransformer.launch.launcher import launch
from unitransformer.profiling.step_events import StepEvent, StepTrace
from unitransformer.profiling.tensor_bytes import PeakTensorBytes, find_live_tensors
from unitransformer.training.module import TrainingModule
from unitransformer.training.trainer import build_trainer

# By then, DDP has built its buckets and DeepSpeed knows the order of the modules.
COUNTED_STEP = 3  # from 0

_COLLECTIVES = {
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

_MODULE = "module "  # prefix of the ranges of `ModuleTrace`
_FSDP = "FSDP::"  # what FSDP2 does between modules: "FSDP::all_gather (network)"
_NODE = "autograd::engine::evaluate_function: "


class ModuleTrace(StepTrace):
    """Locates each event of a step.

    A location is the module whose forward pass was running, or whose forward pass created the node
    of the backward pass; or `optimizer`, `zero_grad`, `gradients` (their accumulation), `step`
    (everything else).

    Args:
        module: its modules' names become locations; None: no module does. Must be None for compiled
            modules, whose graphs the hooks would change.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self._names = {} if module is None else module_names(module)
        self._open: list[tuple[nn.Module, record_function]] = []
        self._hooks = contextlib.ExitStack()
        # An autograd node's thread and number -> where it was created.
        self._forward: dict[tuple[int, int], str] = {}

    def start(self) -> None:
        if self._names:
            before = register_module_forward_pre_hook(self._enter_module)
            after = register_module_forward_hook(self._exit_module, always_call=True)
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)
        super().start()

    def stop(self) -> None:
        super().stop()
        self._hooks.close()

    def locate(self, node: Any, outer: str) -> str:
        name: str = node.name
        key = node.start_tid, getattr(node.extra_fields, "sequence_number", -1)
        if name.startswith(_NODE):
            return "gradients" if "AccumulateGrad" in name else self._forward.get(key, outer)
        if name.startswith(_MODULE):
            location = name.removeprefix(_MODULE)
        elif name.startswith(_FSDP):
            location = name.partition("(")[2].rstrip(")").removeprefix("objective.") or "objective"
        elif name.startswith("Optimizer.zero_grad"):
            location = "zero_grad"
        else:
            location = "optimizer" if name.startswith("Optimizer.step") else outer
        if "::" in name and key[1] >= 0:
            self._forward.setdefault(key, location)
        return location

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if id(module) in self._names:
            range_ = record_function(_MODULE + self._names[id(module)])
            range_.__enter__()  # type: ignore[no-untyped-call]
            self._open.append((module, range_))

    def _exit_module(self, module: nn.Module, *_: Any) -> None:
        if self._open and self._open[-1][0] is module:
            self._open.pop()[1].__exit__(None, None, None)


def module_names(module: nn.Module) -> dict[int, str]:
    """Returns each submodule's name by its identity, without FSDP1's additions to the name."""
    names = {}
    for name, submodule in module.named_modules():
        plain = ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")
        if plain:
            names[id(submodule)] = plain.removeprefix("objective.")
    return names


class CountStep(pl.Callback):
    """Counts optimizer step `COUNTED_STEP` of a run; the profiler starts one step earlier."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._first = COUNTED_STEP * config.accumulate  # micro-batch
        self._ignored = find_live_tensors()  # from earlier work of this process
        self._peak: PeakTensorBytes | None = None
        self.counters: dict[str, dict[str, int]] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self._first - self.config.accumulate:
            self._peak = PeakTensorBytes(
                module=pl_module,
                optimizers=trainer.optimizers,
                trace=ModuleTrace(pl_module if self.config.parallel.compile == "off" else None),
                ignored=self._ignored,
            )
            self._peak.__enter__()
        elif batch_idx == self._first:
            assert self._peak is not None
            self._peak.begin()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != self._first + self.config.accumulate - 1:
            return
        assert self._peak is not None
        self._peak.__exit__(None, None, None)
        self.counters = count_events(self._peak.events, self.config.parallel.world_size)
        self.counters["peak_bytes"] = self._peak.by_location


def count_run(config: RunConfig, *, run_dir: Path) -> dict[str, dict[str, int]]:
    """Trains a few steps of `config` on synthetic data; all ranks call this.

    Returns:
        The counters of this rank, by the names in `scaling.comparison.counters.NAMES`.
    """
    steps = COUNTED_STEP + 1
    config = replace(
        config,
        max_steps=steps,
        data=replace(config.data, source="synthetic"),
        optimizer=replace(config.optimizer, schedule_steps=steps),
    )
    counting = CountStep(config)
    module = TrainingModule(config)
    parameters = count_parameters(module)
    trainer = build_trainer(config, run_dir=run_dir, callbacks=[counting], segment=0)
    trainer.limit_val_batches = 0
    trainer.fit(module, datamodule=DataModule(config, load_source(config)))
    return {"parameters": parameters, **count_graphs(), **counting.counters}


def count_ranks(config: RunConfig) -> dict[str, dict[str, int]]:
    """Starts the ranks of `config` on the CPU of this machine; returns the counters of rank 0.

    Raises:
        RuntimeError: a rank failed.
    """
    parallel = replace(config.parallel, accelerator="cpu")
    config = replace(config, parallel=parallel)
    with tempfile.TemporaryDirectory(prefix="unitransformer-") as name:
        counted = Path(name) / "counted.json"

        def be_rank() -> int:
            set_up_process(parallel, "cpu")
            counters = count_run(config, run_dir=Path(name))
            if process_rank() == 0:
                counted.write_text(json.dumps(counters))
            return 0

        if parallel.world_size == 1:
            be_rank()
        else:
            ended = launch(parallel.world_size, be_rank, command=(), fork=True)
            if not counted.exists():
                raise RuntimeError(f"{parallel.world_size} ranks: {ended}")
        counters: dict[str, dict[str, int]] = json.loads(counted.read_text())
        return counters


def count_parameters(module: TrainingModule) -> dict[str, int]:
    """Returns the number of parameters of each module, before they are sharded."""
    names = module_names(module)
    return _without_zeros(
        {
            names[id(child)]: sum(p.numel() for p in child.parameters(recurse=False))
            for child in module.modules()
            if id(child) in names
        }
    )


def count_events(events: Iterable[StepEvent], world_size: int) -> dict[str, dict[str, int]]:
    """Returns the operators, FLOPs and collectives of a step.

    Operators are all calls of torch's dispatcher, including nested ones. The bytes of a collective
    are those of its full tensor: reduced, gathered, or to be scattered. With n ranks, each rank of
    a ring sends 2(n-1)/n of an all-reduce's bytes, and (n-1)/n of a gather's or scatter's
    (nccl-tests, doc/PERFORMANCE.md).
    """
    flops, operators, names = Counter[str](), Counter[str](), Counter[str]()
    calls, sizes = Counter[str](), Counter[str]()
    for event in events:
        if event.name.startswith("aten::"):
            operators[event.location] += 1
            names[event.name] += 1
            flops[event.location] += matmul_flops(event)
        elif event.name.startswith("c10d::"):
            kind = _COLLECTIVES.get(event.name, event.name)
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
    """Returns the FLOPs of a matrix product or of attention; 0 for other operators.

    A multiply-add counts as two. The backward pass of attention counts twice its forward pass,
    without recomputation. A causal mask does not reduce the count.
    """
    match event.name:
        case "aten::mm" | "aten::bmm":
            left, right = event.inputs[0].sizes, event.inputs[1].sizes
        case "aten::addmm" | "aten::baddbmm":
            left, right = event.inputs[1].sizes, event.inputs[2].sizes
        case "aten::_scaled_dot_product_flash_attention_for_cpu":
            return _attention_flops(event.inputs[0], event.inputs[1])
        case "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
            return 2 * _attention_flops(event.inputs[1], event.inputs[2])
        case _:
            return 0
    batch = left[0] if len(left) == 3 else 1
    return int(2 * batch * left[-2] * left[-1] * right[-1])


def _attention_flops(query: Any, key: Any) -> int:
    batch, heads, queries, width = query.sizes
    return int(4 * batch * heads * queries * key.sizes[2] * width)


def _collective_bytes(event: StepEvent, world_size: int) -> int:
    if event.name == "c10d::allgather_":  # the profiler does not record its list of lists
        return world_size * _num_bytes(event.inputs[1])
    # Outputs come first; the input of a scatter is the full tensor.
    is_scatter = event.name in ("c10d::_reduce_scatter_base_", "c10d::reduce_scatter_tensor_")
    return _num_bytes(event.inputs[1 if is_scatter else 0])


def _num_bytes(tensors: Any) -> int:
    if isinstance(tensors, list | tuple):
        return sum(_num_bytes(tensor) for tensor in tensors)
    return int(math.prod(tensors.sizes) * tensors.dtype.itemsize)


def count_graphs() -> dict[str, dict[str, int]]:
    """Returns what torch.compile did in this process so far, by source line of the functions."""
    graphs, breaks, recompiles = Counter[str](), Counter[str](), Counter[str]()
    for metrics in get_compilation_metrics():
        if metrics.co_filename is None:
            continue  # the backward pass of a counted graph
        code = f"{Path(metrics.co_filename).name}:{metrics.co_firstlineno}"
        location = f"{code} {metrics.co_name}"
        graphs[location] += 1
        recompiles[location] += bool(metrics.recompile_reason)
    for reason, number in torch._dynamo.utils.counters["graph_break"].items():
        breaks[reason.splitlines()[0]] += number
    return {
        "graphs": dict(graphs),
        "graph_breaks": dict(breaks),
        "recompiles": _without_zeros(recompiles),
    }


def _without_zeros(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def main() -> int:
    """Answers one question and returns 0, also if the answer is a failure."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what training prints
    try:
        answer: dict[str, Any] = count_ranks(_resolve(sys.stdin.readline()))
    except Exception as error:
        lines = str(error).splitlines() or [""]
        answer = {"failure": f"{type(error).__name__}: {lines[0]}"}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return 0


def _resolve(question: str) -> RunConfig:
    """Asks `recipes.service.plan` for a config; by name, as recipes import this package."""
    plan = importlib.import_module("recipes.service.plan")
    with (
        mock.patch.object(sys, "stdin", io.StringIO(question)),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        plan.main()
    answer = json.loads(printed.getvalue())
    if "config" not in answer:
        raise ValueError(answer.get("misread") or answer["refused"])
    return from_dict(RunConfig, answer["config"])


if __name__ == "__main__":
    sys.exit(main())
