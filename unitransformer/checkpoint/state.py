"""What is trained, by plain names, whatever holds it: the tensors of a checkpoint.

`weight.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` for every parameter NAME of the network. A rank
gives its shares of them (DTensors), or where it has all values some whole ones: the ranks divide
them. Whatever wrote them, every strategy reads them.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from unitransformer.parallel import deepspeed
from unitransformer.parallel.deepspeed import MOMENTS
from unitransformer.parallel.fsdp1 import NETWORK_PREFIX, ignore_future_warnings, sharded_weights
from unitransformer.training.module import TrainingModule

State = dict[str, Tensor]
FillState = Callable[[State], None]  # fills the tensors of a state with their saved values


def count_updates(trainer: Trainer) -> int:
    """Optimizer steps as AdamW counts them: not those skipped for a gradient that overflowed."""
    optimizer: Any = trainer.optimizers[0]
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def capture_state(module: TrainingModule, trainer: Trainer) -> State:
    """This rank's part of all weights and moments; all ranks have to call this.

    Some of the tensors are those that training goes on to change.
    """
    strategy = module.config.parallel.strategy
    if strategy == "fsdp1":
        return _take_fsdp1(trainer)
    if module.config.parallel.uses_deepspeed:
        deepspeed.link_moments(trainer.optimizers[0])
        return _take_zero(module)
    state: State = {}
    optimizer = trainer.optimizers[0]
    for name, parameter in module.network.named_parameters():
        state[f"weight.{name}"] = parameter.detach()
        state |= {f"{key}.{name}": optimizer.state[parameter][key] for key in MOMENTS}
    if strategy == "ddp":
        is_own = _deal()
        state = {name: values for name, values in state.items() if is_own(values.nbytes)}
    return state


def _deal() -> Callable[[int], bool]:
    """Asked for one tensor after the other, by its bytes: whether it is for this rank to write.

    Each goes to the rank that has got least.
    """
    rank = torch.distributed.get_rank()
    dealt = [0] * torch.distributed.get_world_size()

    def is_own(num_bytes: int) -> bool:
        least = dealt.index(min(dealt))
        dealt[least] += num_bytes
        return least == rank

    return is_own


def restore_state(module: TrainingModule, trainer: Trainer, read: FillState, *, step: int) -> None:
    """The reverse of `capture_state`, for an optimizer that has not stepped yet.

    Args:
        step: what AdamW had counted when the state was saved.
    """
    if module.config.parallel.strategy == "fsdp1":
        return _put_fsdp1(trainer, read, step)
    if module.config.parallel.uses_deepspeed:
        return _put_zero(module, trainer, read, step)
    optimizer = trainer.optimizers[0]
    is_fused = bool(optimizer.defaults["fused"])
    state: State = {}
    for name, parameter in module.network.named_parameters():
        device = parameter.device if is_fused else "cpu"
        moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=device), **moments}
        state[f"weight.{name}"] = parameter.detach()
        state |= {f"{key}.{name}": values for key, values in moments.items()}
    return read(state)


def _take_fsdp1(trainer: Trainer) -> State:
    model = trainer.strategy.model
    assert model is not None
    state: State = {f"weight.{name}": values for name, values in sharded_weights(model).items()}
    with ignore_future_warnings():
        saved = get_optimizer_state_dict(model, trainer.optimizers[0])
    for name, values in cast(dict[str, State], saved["state"]).items():
        state |= {f"{key}.{name.removeprefix(NETWORK_PREFIX)}": values[key] for key in MOMENTS}
    return state


def _put_fsdp1(trainer: Trainer, read: FillState, step: int) -> None:
    model, optimizer = trainer.strategy.model, trainer.optimizers[0]
    assert model is not None
    weights = sharded_weights(model)
    moments = {
        name: {key: torch.zeros_like(values, dtype=torch.float32) for key in MOMENTS}
        for name, values in weights.items()
    }
    state: State = {f"weight.{name}": values for name, values in weights.items()}
    for name, of_parameter in moments.items():
        state |= {f"{key}.{name}": values for key, values in of_parameter.items()}
    read(state)
    with ignore_future_warnings():
        set_model_state_dict(
            model,
            {f"{NETWORK_PREFIX}{name}": values for name, values in weights.items()},
            options=StateDictOptions(strict=False),  # the table of positions is no weight
        )
        saved = get_optimizer_state_dict(model, optimizer)
        saved["state"] = {
            f"{NETWORK_PREFIX}{name}": {"step": torch.tensor(float(step)), **of_parameter}
            for name, of_parameter in moments.items()
        }
        set_optimizer_state_dict(model, optimizer, saved)


def _take_zero(module: TrainingModule) -> State:
    is_own = _deal()
    state: State = {}
    for name, parameter in module.network.named_parameters():
        for key in ("weight", *MOMENTS):
            whole = deepspeed.gather_values(parameter, key)
            if is_own(whole.nbytes):
                state[f"{key}.{name}"] = whole.cpu()
    return state


def _put_zero(module: TrainingModule, trainer: Trainer, read: FillState, step: int) -> None:
    deepspeed.create_moments(trainer.optimizers[0], step)
    for name, parameter in module.network.named_parameters():
        whole = {
            f"{key}.{name}": torch.empty(deepspeed.full_shape(parameter))
            for key in ("weight", *MOMENTS)
        }
        read(whole)  # one parameter at a time: no rank holds more of the whole
        for key in ("weight", *MOMENTS):
            deepspeed.scatter_values(parameter, key, whole[f"{key}.{name}"])
