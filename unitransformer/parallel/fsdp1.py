"""FSDP1 through Lightning's FSDPStrategy, on CPUs too."""

import warnings
from typing import Any, cast

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from unitransformer.parallel.materialize import Materializer
from unitransformer.transformer import TransformerLayer

NETWORK_PREFIX = "objective.network."  # of parameter names in the module that Lightning wraps
WRAPPER_PREFIX = "_fsdp_wrapped_module."  # added by FSDP1 to parameter names


class FSDP1Strategy(FSDPStrategy):
    """Lightning's strategy, extended to CPUs and to our initial weights.

    Each layer is one unit, as under FSDP2. A unit is allocated just before it is sharded, so that a
    rank holds at most its shards and one layer, or twice the weights outside of layers.
    """

    def __init__(self, **options: Any) -> None:
        policy = ModuleWrapPolicy({TransformerLayer})
        super().__init__(auto_wrap_policy=policy, state_dict_type="sharded", **options)

    def setup_environment(self) -> None:
        super().setup_environment()
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        self.kwargs["device_mesh"] = mesh  # makes state dicts hold DTensors

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """Gathers weights in 16 bits and sums gradients in float32, as under FSDP2."""
        dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        dtype = dtypes.get(self.precision_plugin.precision)
        if dtype is None:
            return None
        return MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32)

    def _setup_model(self, model: Any) -> nn.Module:
        """Shards a `TrainingModule` whose objective is on the meta device."""
        network, weights = model.objective.network, model.initial_weights
        # Lightning passes the index of the device, which a CPU does not have.
        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            param_init_fn=Materializer(network, weights, self.root_device),
            **self.kwargs,
        )


def plain_name(name: str) -> str:
    """Returns a parameter's name without the prefixes that FSDP1 adds."""
    return name.replace(WRAPPER_PREFIX, "")


def sharded_weights(model: nn.Module) -> dict[str, DTensor]:
    """Returns each parameter by its plain name, sharded over the ranks."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # FSDP1 is deprecated
        state = get_model_state_dict(model)
    # The state also has the positional table, and a second name for a shared matrix.
    names = {plain_name(name) for name, _ in model.named_parameters()}
    return {
        name.removeprefix(NETWORK_PREFIX): cast(DTensor, values)
        for name, values in state.items()
        if name in names
    }
