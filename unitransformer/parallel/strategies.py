"""A name -> a Lightning strategy, and how a network is spread. Nothing here edits the network."""

import datetime
from collections.abc import Iterator
from typing import Any, assert_never

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
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
from torch.distributed.tensor import DTensor, distribute_tensor

from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.objectives import Objective
from unitransformer.parallel import deepspeed
from unitransformer.parallel.deepspeed import ZeroStrategy
from unitransformer.parallel.fsdp1 import FSDP1Strategy, float16_precision, sharded_weights
from unitransformer.transformer import Transformer, Values

FIRST_SCALE_POWER = 12  # of the loss in float16; at torch's 16 BERT overflows and skips a step
# A rank that dies is noticed by the launcher at once; this bounds only a stuck collective.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


def build_strategy(config: RunConfig, device: str) -> Strategy:
    """The strategy of `config` on `device`, "cpu" or "cuda".

    `single` and `ddp` hold the whole model on each device; `fsdp` (FSDP2), `fsdp1` and `zero3`
    divide it over all of them, `hsdp` over those of a node; `zero1` divides optimizer states,
    `zero2` gradients as well. `auto` has been resolved before.
    """
    parallel = config.parallel
    common: dict[str, Any] = {
        "process_group_backend": "nccl" if device == "cuda" else "gloo",
        "timeout": COLLECTIVE_TIMEOUT,
    }
    match parallel.strategy:
        case "single":
            return SingleDeviceStrategy(device="cuda:0" if device == "cuda" else "cpu")
        case "ddp":
            return DDPStrategy(
                gradient_as_bucket_view=True,
                # A static graph cannot leave out the reduction after all but the last micro-batch.
                static_graph=config.accumulate == 1,
                **common,
            )
        case "fsdp" | "hsdp":
            return FSDP2Strategy(parallel, **common)
        case "fsdp1":
            return FSDP1Strategy(cpu_offload=parallel.cpu_offload, **common)
        case "zero1" | "zero2" | "zero3":
            return ZeroStrategy(
                stage=int(parallel.strategy[-1]),
                device=device,
                batch_size=config.batch_size,
                num_parameters=count_parameters(config.model),
                offload=parallel.cpu_offload,
                initial_scale_power=FIRST_SCALE_POWER,
                **common,
            )
        case "auto":
            raise AssertionError("the strategy is decided in `choose_strategy`")
        case unknown:
            assert_never(unknown)


def build_precision(parallel: ParallelConfig, device: str) -> Precision | None:
    """What computes in float16 and scales the loss; None: what Lightning takes by name.

    By name it would take bf16-mixed on a CPU, and for FSDP1 a scaler that is off without CUDA.
    """
    if parallel.precision != "16-mixed":
        return None
    match parallel.strategy:
        case "single" | "ddp":
            scaler = torch.amp.GradScaler(device, init_scale=2.0**FIRST_SCALE_POWER)
            return MixedPrecision("16-mixed", device, scaler)
        case "fsdp1":
            return float16_precision(device, 2.0**FIRST_SCALE_POWER)
        case "zero1" | "zero2" | "zero3":
            return None  # DeepSpeed scales by itself, from the same on
        case other:
            raise AssertionError(f"the config refuses float16 for {other}")


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's, with the mesh set so that it shards, and weights left where they wait."""

    def __init__(self, parallel: ParallelConfig, **options: Any) -> None:
        # Lightning's own sizes would make every device of a node a tensor-parallel one, and
        # shard nothing.
        super().__init__(data_parallel_size=parallel.world_size, tensor_parallel_size=1, **options)
        self.is_offloaded = parallel.cpu_offload
        if self.is_offloaded:
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of weights that wait there

    def model_to_device(self) -> None:
        if not self.is_offloaded:
            super().model_to_device()


def shard(
    objective: Objective, parallel: ParallelConfig, strategy: Strategy, values: Values
) -> None:
    """Spread a network on the meta device over all ranks and give it its first weights.

    One group of weights a layer: gathering layer i + 1 hides behind computing layer i. Embedding,
    last norm and head are the group around them. No rank ever holds more than its share and one
    layer.
    """
    device = strategy.root_device
    match parallel.strategy:
        case "fsdp" | "hsdp":
            _fully_shard(objective, parallel, device)
            objective.to_empty(device="cpu" if parallel.cpu_offload else device)
            objective.network.initialise(values, assign=_assign_share)
            if parallel.cpu_offload:
                objective.network.pe.to(device)
        case "zero3":
            assert isinstance(strategy, ZeroStrategy)
            deepspeed.partition(objective, strategy, device, values)
        case "fsdp1":
            pass  # `FSDP1Strategy` does both at once, when Lightning hands it the whole module
        case other:
            raise AssertionError(f"{other} holds whole weights")


def _fully_shard(objective: Objective, parallel: ParallelConfig, device: torch.device) -> None:
    if parallel.strategy == "hsdp":
        sizes, names = (parallel.num_nodes, parallel.devices), ("replicate", "shard")
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(device.type, (parallel.world_size,), mesh_dim_names=("shard",))
    options: dict[str, Any] = {"mesh": mesh}
    if mesh.size(-1) == 1:
        options["reshard_after_forward"] = False  # nobody else holds a share: nothing is let go
    if parallel.precision == "bf16-mixed":
        # Half the bytes to gather that autocast alone would need; gradients add up in float32.
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if parallel.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in objective.network.transformer_layers:
        fully_shard(layer, **options)
    fully_shard(objective, **options)
    register_fsdp_forward_method(objective, "score")


def _assign_share(parameter: Tensor, values: Tensor) -> None:
    """Copy into this rank's share of `parameter` its part of the whole `values`."""
    if isinstance(parameter, DTensor):
        # Every rank has drawn the same values, so nothing needs to be sent.
        values = distribute_tensor(
            values, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(values)


def clip_gradients(model: nn.Module, clip_norm: float) -> Tensor:
    """Clip gradients by their norm over all parameters and ranks; returns the norm before.

    Not for DeepSpeed, which does it itself.

    Args:
        model: what the strategy trains, wrapped as it is.
    """
    if isinstance(model, FullyShardedDataParallel):
        norm: Tensor = model.clip_grad_norm_(clip_norm)  # each rank knows a share of the norm
        return norm
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # once, not once a parameter
    nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


def gather_network(model: nn.Module, network: Transformer, parallel: ParallelConfig) -> Transformer:
    """A whole copy of a divided network on the CPU of the first rank; all ranks have to call this.

    On the others its values mean nothing.
    """
    is_first = torch.distributed.get_rank() == 0
    with torch.device("meta"):
        whole = Transformer(network.config)
    whole.to_empty(device="cpu")
    whole.pe.initialise()
    places = dict(whole.named_parameters())
    with torch.no_grad():
        for name, values in full_weights(model, network, parallel):
            if is_first:
                places[name].copy_(values)
    return whole


def full_weights(
    model: nn.Module, network: Transformer, parallel: ParallelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter by its plain name with all its values, one at a time, on every rank.

    All ranks have to take all of them.
    """
    if parallel.strategy == "fsdp1":
        for name, values in sharded_weights(model).items():
            yield name, values.full_tensor()
        return
    for name, parameter in network.named_parameters():
        if parallel.uses_deepspeed:
            yield name, deepspeed.take(parameter, "weight")
        elif isinstance(parameter, DTensor):
            yield name, parameter.full_tensor()
        else:
            yield name, parameter
