"""A name -> a Lightning strategy, and how a network is spread. Nothing here edits the network."""

import datetime
from typing import Any, assert_never

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from unitransformer.config import ParallelConfig
from unitransformer.objectives import Objective
from unitransformer.transformer import Transformer

# A rank that dies is noticed by the launcher at once; this bounds only a stuck collective.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


def build_strategy(parallel: ParallelConfig, device: str, *, accumulate: int) -> Strategy:
    """The strategy of `parallel` on `device`, "cpu" or "cuda", for `accumulate` micro-batches.

    `single` and `ddp` hold the whole model on each device; `fsdp` divides it over all of them,
    `hsdp` over those of a node. `auto` has been resolved before.
    """
    backend = "nccl" if device == "cuda" else "gloo"
    match parallel.strategy:
        case "single":
            return SingleDeviceStrategy(device="cuda:0" if device == "cuda" else "cpu")
        case "ddp":
            return DDPStrategy(
                process_group_backend=backend,
                gradient_as_bucket_view=True,
                # A static graph cannot leave out the reduction after all but the last micro-batch.
                static_graph=accumulate == 1,
                timeout=COLLECTIVE_TIMEOUT,
            )
        case "fsdp" | "hsdp":
            # Lightning's own sizes would make every device of a node a tensor-parallel one, and
            # shard nothing.
            return ModelParallelStrategy(
                data_parallel_size=parallel.world_size,
                tensor_parallel_size=1,
                save_distributed_checkpoint=False,
                process_group_backend=backend,
                timeout=COLLECTIVE_TIMEOUT,
            )
        case "auto":
            raise AssertionError("the strategy is decided in `ParallelConfig.resolved`")
        case unknown:
            assert_never(unknown)


def shard(objective: Objective, parallel: ParallelConfig, device: torch.device, seed: int) -> None:
    """Spread a network on the meta device over all ranks and give it its first weights.

    One group of weights a layer: gathering layer i + 1 hides behind computing layer i. Embedding,
    last norm and head are the group around them. No rank ever holds more than its share and one
    whole matrix.
    """
    if parallel.strategy == "hsdp":
        sizes, names = (parallel.num_nodes, parallel.devices), ("replicate", "shard")
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(device.type, (parallel.world_size,), mesh_dim_names=("shard",))
    for layer in objective.network.transformer_layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    register_fsdp_forward_method(objective, "score")
    objective.to_empty(device=device)
    objective.network.initialise(seed, assign=_assign_share)


def _assign_share(parameter: Tensor, values: Tensor) -> None:
    """Copy into this rank's share of `parameter` its part of the whole `values`."""
    if isinstance(parameter, DTensor):
        # Every rank has drawn the same values, so nothing needs to be sent.
        values = distribute_tensor(
            values, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(values)


def gather_network(network: Transformer, device: torch.device) -> Transformer:
    """A whole copy of a sharded network on every rank; all ranks have to call this."""
    options = StateDictOptions(full_state_dict=True)
    state: dict[str, Any] = get_model_state_dict(network, options=options)
    with torch.device("meta"):
        whole = Transformer(network.config)
    whole.to_empty(device=device)
    whole.load_state_dict(state)
    return whole
