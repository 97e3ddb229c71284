"""Translates a strategy name into a Lightning strategy; shards; clips gradients."""

import datetime
import inspect
import warnings
from typing import Any, assert_never

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.objectives import Objective
from unitransformer.parallel import deepspeed
from unitransformer.parallel.deepspeed import ZeroStrategy
from unitransformer.parallel.fsdp1 import FSDP1Strategy, sharded_weights
from unitransformer.transformer import InitialWeights, Transformer

INITIAL_SCALE_POWER = 12  # of the float16 loss; at torch's 16, BERT overflows and skips a step
# Bounds a stuck collective only: the launcher notices a dead rank at once.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
# Where the compiler tries many kernels, a slow rank may need long before it joins a collective.
COMPILING_TIMEOUT = datetime.timedelta(hours=1)
# DDP's option to broadcast buffers before each forward pass, which torch 2.13 has renamed.
_HAS_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_BROADCAST_BUFFERS = "forward_sync_buffers" if _HAS_NEW_NAME else "broadcast_buffers"


def build_strategy(config: RunConfig, device: str) -> Strategy:
    """Returns the strategy of a resolved `config` on `device`, "cpu" or "cuda".

    `single` and `ddp` hold the whole model on each device; `fsdp` (FSDP2), `fsdp1` and `zero3`
    shard it over all devices, `hsdp` over those of a node; `zero1` shards optimizer states,
    `zero2` gradients as well.
    """
    parallel = config.parallel
    tries_kernels = parallel.compile.startswith("max-autotune")
    common: dict[str, Any] = {
        "process_group_backend": "nccl" if device == "cuda" else "gloo",
        "timeout": COMPILING_TIMEOUT if tries_kernels else COLLECTIVE_TIMEOUT,
    }
    match parallel.strategy:
        case "single":
            return SingleDeviceStrategy(device="cuda:0" if device == "cuda" else "cpu")
        case "ddp":
            # The only buffer is the constant table of positions, which all ranks have.
            common[_BROADCAST_BUFFERS] = False
            return DDPStrategy(
                gradient_as_bucket_view=True,
                # A static graph cannot skip the reduction between micro-batches.
                static_graph=config.accumulate == 1,
                **common,
            )
        case "fsdp" | "hsdp":
            return FSDP2Strategy(parallel, **common)
        case "fsdp1":
            return FSDP1Strategy(cpu_offload=parallel.cpu_offload, **common)
        case "zero1" | "zero2" | "zero3":
            return ZeroStrategy(config, device, initial_scale_power=INITIAL_SCALE_POWER, **common)
        case "auto":
            raise AssertionError("`choose_strategy` replaces auto")
        case unknown:
            assert_never(unknown)


def count_unbucketed_steps(config: RunConfig) -> int:
    """Returns how many first steps of a launch reduce all gradients at once, at their end.

    DDP divides gradients into buckets, whose reduction overlaps with the backward pass, once it has
    seen their order: after the first step, with a static graph after the second (torch 2.13).
    """
    parallel = config.parallel
    if parallel.strategy != "ddp" or parallel.world_size == 1:
        return 0
    return 2 if config.accumulate == 1 else 1


def build_precision(parallel: ParallelConfig, device: str) -> Precision | None:
    """Returns the precision plugin for float16, or None to let Lightning choose one by name.

    For float16 Lightning would choose bf16-mixed on a CPU, and no loss scaling for FSDP1 there.
    """
    if parallel.precision != "16-mixed":
        return None
    initial_scale = 2.0**INITIAL_SCALE_POWER
    match parallel.strategy:
        case "single" | "ddp":
            scaler = torch.amp.GradScaler(device, init_scale=initial_scale)
            return MixedPrecision("16-mixed", device, scaler)
        case "fsdp1":
            # Lightning's own scaler warns that it needs CUDA; this one does not.
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                precision = FSDPPrecision("16-mixed")
            precision.scaler = ShardedGradScaler(device, init_scale=initial_scale)
            return precision
        case "zero1" | "zero2" | "zero3":
            return None  # DeepSpeed scales the loss, starting at `initial_scale_power`
        case other:
            raise AssertionError(f"the config refuses float16 for {other}")


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy with a mesh that shards over all devices, and CPU offload."""

    def __init__(self, parallel: ParallelConfig, **options: Any) -> None:
        # By default Lightning would use tensor parallelism within a node, and shard nothing.
        super().__init__(data_parallel_size=parallel.world_size, tensor_parallel_size=1, **options)
        self.is_offloaded = parallel.cpu_offload
        if self.is_offloaded:
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # gradient norms are on the CPU

    def model_to_device(self) -> None:
        if not self.is_offloaded:
            super().model_to_device()


def shard(
    objective: Objective, parallel: ParallelConfig, strategy: Strategy, weights: InitialWeights
) -> None:
    """Shards a network on the meta device over all ranks and initializes it.

    Each layer is one unit, so that gathering layer i + 1 overlaps with computing layer i. A rank
    holds at most its shards and one layer.
    """
    device = strategy.root_device
    match parallel.strategy:
        case "fsdp" | "hsdp":
            _fully_shard(objective, parallel, device)
            objective.to_empty(device="cpu" if parallel.cpu_offload else device)
            objective.network.init_weights(weights, assign=_copy_shard)
            if parallel.cpu_offload:
                objective.network.pe.to(device)
        case "zero3":
            assert isinstance(strategy, ZeroStrategy)
            deepspeed.partition(objective, strategy, device, weights)
        case "fsdp1":
            pass  # `FSDP1Strategy` does this when Lightning sets up the model
        case other:
            raise AssertionError(f"{other} does not shard weights")


def _fully_shard(objective: Objective, parallel: ParallelConfig, device: torch.device) -> None:
    is_hybrid = parallel.strategy == "hsdp"
    sizes = (parallel.num_nodes, parallel.devices) if is_hybrid else (parallel.world_size,)
    names = ("replicate", "shard") if is_hybrid else ("shard",)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    options: dict[str, Any] = {"mesh": mesh}
    if mesh.size(-1) == 1:
        options["reshard_after_forward"] = False  # one rank holds all weights: nothing to free
    if parallel.precision == "bf16-mixed":
        # Gathering bf16 weights takes half the bytes that autocast alone would need.
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    if parallel.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in objective.network.transformer_layers:
        fully_shard(layer, **options)
    fully_shard(objective, **options)
    register_fsdp_forward_method(objective, "score")


def _copy_shard(parameter: Tensor, values: Tensor) -> None:
    """Copies this rank's part of `values` into its shard of `parameter`."""
    if isinstance(parameter, DTensor):
        # All ranks have the same values, so nothing needs to be sent.
        mesh, placements = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    parameter.copy_(values)


def clip_gradients(model: nn.Module, clip_norm: float) -> Tensor:
    """Clips the gradients of a wrapped model by their norm over all ranks; returns that norm."""
    if isinstance(model, FullyShardedDataParallel):
        norm: Tensor = model.clip_grad_norm_(clip_norm)  # combines the norms of all shards
        return norm
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # once, not for every parameter
    nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


@torch.no_grad()
def gather_network(model: nn.Module, network: Transformer, parallel: ParallelConfig) -> Transformer:
    """Returns a CPU copy of a sharded network, full on rank 0; all ranks have to call this."""
    is_first = torch.distributed.get_rank() == 0
    with torch.device("meta"):
        full = Transformer(network.config)
    full.to_empty(device="cpu")
    full.pe.init_weights()
    targets = dict(full.named_parameters())
    is_fsdp1 = parallel.strategy == "fsdp1"
    shards = sharded_weights(model).items() if is_fsdp1 else network.named_parameters()
    for name, values in shards:
        if parallel.uses_deepspeed:
            full_values = deepspeed.gather_values(values, "weight")
        else:
            full_values = values.full_tensor() if isinstance(values, DTensor) else values
        if is_first:
            targets[name].copy_(full_values)
    return full
