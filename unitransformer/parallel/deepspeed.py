"""ZeRO stages 1 to 3 through Lightning's DeepSpeedStrategy, on CPUs too.

Only this file uses DeepSpeed. All ranks must call the functions marked as collective.
"""

import argparse
import math
import os
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.nn import functional

from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.objectives import Objective
from unitransformer.parallel.materialize import Materializer
from unitransformer.transformer import InitialWeights, Transformer

MAX_BUCKET_SIZE = 200_000_000  # parameters; Lightning's default
BUCKET_MULTIPLE = 1024
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's moments of a parameter


def prepare_deepspeed(device: str) -> None:
    """On a CPU, imports DeepSpeed without building its C++ extensions, which gloo does not need."""
    if device != "cpu":
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    deepspeed.ops.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy, extended to CPUs."""

    def __init__(self, config: RunConfig, device: str, **options: Any) -> None:
        prepare_deepspeed(device)
        # Buckets are allocated in full, so they are not larger than the model. DeepSpeed needs an
        # even number and pads parameter groups a little.
        num_blocks = math.ceil(count_parameters(config.model) / BUCKET_MULTIPLE)
        bucket = min(MAX_BUCKET_SIZE, num_blocks * BUCKET_MULTIPLE)
        stage, offload = int(config.parallel.strategy[-1]), config.parallel.cpu_offload
        super().__init__(
            stage=stage,
            allgather_bucket_size=bucket,
            reduce_bucket_size=bucket,
            logging_batch_size_per_gpu=config.batch_size,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
            **options,
        )
        assert isinstance(self.config, dict)
        # Keep torch's AdamW where states are offloaded, too.
        self.config["zero_force_ds_cpu_optimizer"] = False
        # DeepSpeed's linear layer cannot be compiled, and saves no memory here.
        self.config["zero_optimization"]["memory_efficient_linear"] = False

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the number of micro-batches already. A second division
        # would make the gradients too small when they are clipped.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
        self._init_config_if_needed()  # `partition` needs it before Lightning would do this

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        import deepspeed

        engine, optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, optimizer


def partition(
    objective: Objective, strategy: ZeroStrategy, device: torch.device, weights: InitialWeights
) -> None:
    """Initializes an objective on the meta device and shards it, layer by layer."""
    import deepspeed

    network = objective.network
    materialize = Materializer(network, weights, device)
    for layer in network.transformer_layers:
        # Gather all weights of a layer before it and free them after it, as FSDP does.
        deepspeed.utils.set_z3_leaf_module(layer, True)
        layer.apply(materialize)
        deepspeed.zero.Init(module=layer, config_dict_or_path=strategy.config)
    in_layers = {module for layer in network.transformer_layers for module in layer.modules()}
    for module in objective.modules():
        if module not in in_layers:
            materialize(module)
    deepspeed.zero.Init(module=objective, config_dict_or_path=strategy.config)


def set_weights(network: Transformer, weights: InitialWeights) -> None:
    """Sets the optimizer's float32 weights to unrounded values. Collective.

    DeepSpeed copies them from the weights it computes with, which are rounded in bf16.
    """
    for name, parameter in network.named_parameters():
        shape = torch.empty(full_shape(parameter), device="meta")
        scatter_values(parameter, "weight", weights(name, shape))


def full_shape(parameter: Tensor) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def gather_values(parameter: Tensor, key: str) -> Tensor:
    """Returns all float32 values of a weight (`key` "weight") or moment. Collective."""
    from deepspeed import utils

    if key == "weight":
        values: Tensor = utils.safe_get_full_fp32_param(parameter)
    else:
        values = utils.safe_get_full_optimizer_state(parameter, key)
    return values.view(full_shape(parameter))


@torch.no_grad()
def scatter_values(parameter: Any, key: str, values: Tensor) -> None:
    """Reverses `gather_values`: each rank keeps its shard. Collective."""
    import deepspeed
    from deepspeed import utils

    values = values.to(device=parameter.device, dtype=torch.float32)
    if not hasattr(parameter, "ds_id"):
        if key == "weight":
            parameter.data.copy_(values)  # the weight it computes with
            utils.safe_set_full_fp32_param(parameter, values)
        else:
            utils.safe_set_full_optimizer_state(parameter, values, key)
        return
    if key == "weight":
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(values)
    # All shards have the same size, so the last one may be padded.
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padding = size * torch.distributed.get_world_size() - values.numel()
    shard = functional.pad(values.flatten(), (0, padding)).narrow(0, rank * size, size)
    if key == "weight":
        utils.safe_set_local_fp32_param(parameter, shard)
    else:
        utils.safe_set_local_optimizer_state(parameter, shard, key)


def create_moments(optimizer: Any, step: int) -> None:
    """Gives an optimizer that has not stepped yet a step count and moments of zero."""
    names = (
        "single_partition_of_fp32_groups",  # stages 1 and 2
        "fp32_partitioned_groups_flat",  # stage 3
        "fp32_groups_flat_partition",  # stage 1 in bf16
    )
    for partition in next(getattr(optimizer, name) for name in names if hasattr(optimizer, name)):
        optimizer.optimizer.state[partition] = {
            "step": torch.tensor(float(step), device=partition.device),
            **{key: torch.zeros_like(partition) for key in MOMENTS},
        }
    link_moments(optimizer)


def link_moments(optimizer: Any) -> None:
    """Links the moments to all parameters; `gather_values` and `scatter_values` need that.

    Stages 1 and 2 link them after the first parameter group has stepped, when the moments of the
    second group do not exist yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
