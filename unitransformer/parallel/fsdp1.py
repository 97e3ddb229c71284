"""FSDP1 through Lightning's FSDPStrategy, on CPUs too."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from unitransformer.objectives import Objective
from unitransformer.parallel.materialize import Materialise
from unitransformer.transformer import TransformerLayer, Values

PREFIX = "objective.network."  # of the network's parameters, in what Lightning wraps
WRAPPER = "_fsdp_wrapped_module."  # what FSDP1 adds to the names of parameters


class HasObjective(Protocol):
    """What is trained: an objective on the meta device, and its first weights."""

    objective: Objective

    def first_values(self) -> Values: ...


class FSDP1Strategy(FSDPStrategy):
    """Lightning's, which refuses CPUs and leaves the first weights to `reset_parameters`.

    One group of weights a layer, as under FSDP2. What each group gets is made just before it is
    divided, so that no rank ever holds more than its share and a layer, or twice what is in none.
    """

    def __init__(self, **options: Any) -> None:
        policy = ModuleWrapPolicy({TransformerLayer})
        super().__init__(auto_wrap_policy=policy, state_dict_type="sharded", **options)

    def setup_environment(self) -> None:
        super().setup_environment()
        # With a mesh its state dicts hold DTensors.
        size = (self.world_size,)
        self.kwargs["device_mesh"] = init_device_mesh(self.root_device.type, size)

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """Weights are gathered in fewer bits; gradients add up in float32, as under FSDP2."""
        low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        precision = self.precision_plugin.precision
        if precision not in low:
            return None  # every number has the same width
        return MixedPrecision(param_dtype=low[precision], reduce_dtype=torch.float32)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        ours = cast(HasObjective, model)
        fill = Materialise(ours.objective.network, ours.first_values(), self.root_device)
        # Lightning gives the index of the device, and a CPU has none.
        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            param_init_fn=fill,
            **self.kwargs,
        )


def float16_precision(device: str, first_scale: float) -> FSDPPrecision:
    """Lightning's, whose own scaler is for CUDA and off elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is off
        precision = FSDPPrecision("16-mixed")
    precision.scaler = ShardedGradScaler(device, init_scale=first_scale)
    return precision


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP1 adds to it."""
    return name.replace(WRAPPER, "")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without FSDP1's warnings that it will be replaced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def sharded_weights(model: nn.Module) -> dict[str, DTensor]:
    """Each parameter by its plain name, divided as it is over the ranks."""
    with quietly():
        state = get_model_state_dict(model)
    # Neither the table of positions nor a second name of a matrix that two modules share.
    names = {plain_name(name) for name, _ in model.named_parameters()}
    return {
        name.removeprefix(PREFIX): cast(DTensor, values)
        for name, values in state.items()
        if name in names
    }
