"""ZeRO through Lightning's DeepSpeedStrategy, on CPUs too. The only file that knows DeepSpeed."""

import argparse
import math
import os
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.nn import functional

from unitransformer.objectives import Objective
from unitransformer.parallel.materialize import Materialise
from unitransformer.transformer import Transformer, Values

BUCKET = 200_000_000  # parameters; Lightning's own
ALIGNED = 1024
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's states of a parameter


def load_deepspeed(device: str) -> None:
    """Import DeepSpeed; on a CPU without a word, and without its C++ extensions.

    They are neither looked for nor built: gloo and torch do without.
    """
    if device != "cpu":
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    deepspeed.ops.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's, which refuses CPUs.

    Args:
        stage: what is divided: 1 optimizer states, 2 gradients as well, 3 weights as well.
        device: "cpu" or "cuda".
        batch_size: samples a device takes at once.
        num_parameters: of the model; buckets are no larger, as they are allocated whole.
        offload: optimizer states, and in stage 3 weights, wait in host memory.
    """

    def __init__(
        self,
        *,
        stage: int,
        device: str,
        batch_size: int,
        num_parameters: int,
        offload: bool,
        **options: Any,
    ) -> None:
        load_deepspeed(device)
        # DeepSpeed wants a multiple of 2 and fills groups up to a few more.
        bucket = min(BUCKET, math.ceil(num_parameters / ALIGNED) * ALIGNED)
        super().__init__(
            stage=stage,
            allgather_bucket_size=bucket,
            reduce_bucket_size=bucket,
            logging_batch_size_per_gpu=batch_size,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
            **options,
        )
        assert isinstance(self.config, dict)
        # Our optimizer is torch's AdamW wherever its states are.
        self.config["zero_force_ds_cpu_optimizer"] = False
        # Its own linear layer is not for compiling, and saves nothing that autograd does not.
        self.config["zero_optimization"]["memory_efficient_linear"] = False

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the number of micro-batches; DeepSpeed would again, and
        # clip gradients that are too small.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
        self._init_config_if_needed()  # the first thing that is built already needs it

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
    objective: Objective, strategy: ZeroStrategy, device: torch.device, values: Values
) -> None:
    """Give an objective on the meta device its first weights and divide them, layer by layer."""
    import deepspeed

    network = objective.network
    fill = Materialise(network, values, device)
    for layer in network.transformer_layers:
        # Fetched whole before the layer and let go after it, as FSDP does.
        deepspeed.utils.set_z3_leaf_module(layer, True)
        layer.apply(fill)
        deepspeed.zero.Init(module=layer, config_dict_or_path=strategy.config)
    inside = {module for layer in network.transformer_layers for module in layer.modules()}
    for module in objective.modules():
        if module not in inside:
            fill(module)
    deepspeed.zero.Init(module=objective, config_dict_or_path=strategy.config)


def set_weights(network: Transformer, values: Values) -> None:
    """Give the float32 weights that the optimizer steps their whole values; all ranks call this.

    DeepSpeed makes them from those it computes with, which bf16 has rounded.
    """
    for name, parameter in network.named_parameters():
        put(parameter, "weight", values(name, torch.empty(whole_shape(parameter), device="meta")))


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of all the values of a parameter that may be divided."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def take(parameter: Tensor, key: str) -> Tensor:
    """All values of a float32 weight (`key` weight) or moment; all ranks have to call this."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole: Tensor = (
        safe_get_full_fp32_param(parameter)
        if key == "weight"
        else safe_get_full_optimizer_state(parameter, key)
    )
    return whole.view(whole_shape(parameter))


@torch.no_grad()
def put(parameter: Any, key: str, values: Tensor) -> None:
    """The reverse of `take`: each rank keeps its share; all ranks have to call this."""
    import deepspeed
    from deepspeed import utils

    values = values.to(device=parameter.device, dtype=torch.float32)
    if not hasattr(parameter, "ds_id"):
        if key == "weight":
            parameter.data.copy_(values)  # what it computes with
            utils.safe_set_full_fp32_param(parameter, values)
        else:
            utils.safe_set_full_optimizer_state(parameter, values, key)
        return
    if key == "weight":
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(values)
    # The shares are equal, so the last may reach beyond the end.
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padding = size * torch.distributed.get_world_size() - values.numel()
    share = functional.pad(values.flatten(), (0, padding)).narrow(0, rank * size, size)
    if key == "weight":
        utils.safe_set_local_fp32_param(parameter, share)
    else:
        utils.safe_set_local_optimizer_state(parameter, share, key)


def make_moments(optimizer: Any, step: int) -> None:
    """Give an optimizer that has not stepped yet the states it has after `step` steps: zeros."""
    partitions = next(
        getattr(optimizer, name)
        for name in (
            "single_partition_of_fp32_groups",  # stages 1 and 2
            "fp32_partitioned_groups_flat",  # stage 3
            "fp32_groups_flat_partition",  # stage 1 in bf16
        )
        if hasattr(optimizer, name)
    )
    for partition in partitions:
        optimizer.optimizer.state[partition] = {
            "step": torch.tensor(float(step), device=partition.device),
            **{key: torch.zeros_like(partition) for key in MOMENTS},
        }
    link_moments(optimizer)


def link_moments(optimizer: Any) -> None:
    """Let `take` and `put` find the moments of all parameters; comes before them.

    Stages 1 and 2 link them when the first group of parameters has stepped, and the moments of
    the second are not there yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
