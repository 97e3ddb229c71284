"""The tensors of a checkpoint, with the same names and values under every strategy.

They are `weight.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` for every parameter NAME of the
network. A rank holds its shards as DTensors. Where every rank has all values, the ranks divide the
full tensors among them. Every strategy reads what any other has written.
"""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed
from lightning.pytorch import Trainer
from torch import Tensor

from unitransformer.parallel import deepspeed
from unitransformer.parallel.deepspeed import MOMENTS
from unitransformer.parallel.fsdp1 import NETWORK_PREFIX, sharded_weights
from unitransformer.training.module import TrainingModule

State = dict[str, Tensor]
FillState = Callable[[State], None]  # fills the tensors of a state with their saved values


def count_updates(trainer: Trainer) -> int:
    """Returns AdamW's count of optimizer steps, without those skipped after an overflow.

    All parameters share it, so that one value is read from the device.
    """
    optimizer: Any = trainer.optimizers[0]
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return next((int(state["step"]) for state in states if "step" in state), 0)


def capture_state(module: TrainingModule, trainer: Trainer) -> State:
    """Returns this rank's part of all weights and moments; all ranks have to call this.

    Some of the tensors are not copies: the next step changes them.
    """
    strategy = module.config.parallel.strategy
    if strategy == "fsdp1":
        return _capture_fsdp1(trainer)
    if module.config.parallel.uses_deepspeed:
        deepspeed.link_moments(trainer.optimizers[0])
        return _capture_zero(module)
    state: State = {}
    optimizer = trainer.optimizers[0]
    for name, parameter in module.network.named_parameters():
        state[f"weight.{name}"] = parameter.detach()
        state |= {f"{key}.{name}": optimizer.state[parameter][key] for key in MOMENTS}
    if strategy == "ddp":
        is_mine = _divide_over_ranks()
        state = {name: values for name, values in state.items() if is_mine(values.nbytes)}
    return state


def _divide_over_ranks() -> Callable[[int], bool]:
    """Returns a function of a tensor's size: whether this rank writes the tensor.

    Each tensor goes to the rank with the fewest bytes so far.
    """
    rank = torch.distributed.get_rank()
    rank_bytes = [0] * torch.distributed.get_world_size()

    def is_mine(num_bytes: int) -> bool:
        writer = rank_bytes.index(min(rank_bytes))
        rank_bytes[writer] += num_bytes
        return writer == rank

    return is_mine


def restore_state(module: TrainingModule, trainer: Trainer, read: FillState, *, step: int) -> None:
    """Reverses `capture_state`, for an optimizer that has not stepped yet.

    Args:
        step: AdamW's count of steps when the state was saved.
    """
    if module.config.parallel.strategy == "fsdp1":
        return _restore_fsdp1(trainer, read, step)
    if module.config.parallel.uses_deepspeed:
        return _restore_zero(module, trainer, read, step)
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


def _capture_fsdp1(trainer: Trainer) -> State:
    from torch.distributed.checkpoint import state_dict

    model = trainer.strategy.model
    assert model is not None
    state: State = {f"weight.{name}": values for name, values in sharded_weights(model).items()}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # FSDP1 is deprecated
        saved = state_dict.get_optimizer_state_dict(model, trainer.optimizers[0])
    for name, values in cast(dict[str, State], saved["state"]).items():
        state |= {f"{key}.{name.removeprefix(NETWORK_PREFIX)}": values[key] for key in MOMENTS}
    return state


def _restore_fsdp1(trainer: Trainer, read: FillState, step: int) -> None:
    from torch.distributed.checkpoint import state_dict

    model, optimizer = trainer.strategy.model, trainer.optimizers[0]
    assert model is not None
    weights = sharded_weights(model)
    state: State = {f"weight.{name}": values for name, values in weights.items()}
    moments = {}
    for name, values in weights.items():
        moments[name] = {key: torch.zeros_like(values, dtype=torch.float32) for key in MOMENTS}
        state |= {f"{key}.{name}": moment for key, moment in moments[name].items()}
    read(state)
    prefixed: dict[str, Any] = {NETWORK_PREFIX + name: weights[name] for name in weights}
    is_partial = state_dict.StateDictOptions(strict=False)  # without the positional table
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # FSDP1 is deprecated
        state_dict.set_model_state_dict(model, prefixed, options=is_partial)
        saved = state_dict.get_optimizer_state_dict(model, optimizer)
        saved["state"] = {
            NETWORK_PREFIX + name: {"step": torch.tensor(float(step)), **pair}
            for name, pair in moments.items()
        }
        state_dict.set_optimizer_state_dict(model, optimizer, saved)


def _capture_zero(module: TrainingModule) -> State:
    is_mine = _divide_over_ranks()
    state: State = {}
    for name, parameter in module.network.named_parameters():
        for key in ("weight", *MOMENTS):
            values = deepspeed.gather_values(parameter, key)
            if is_mine(values.nbytes):
                state[f"{key}.{name}"] = values.cpu()
    return state


def _restore_zero(module: TrainingModule, trainer: Trainer, read: FillState, step: int) -> None:
    deepspeed.create_moments(trainer.optimizers[0], step)
    for name, parameter in module.network.named_parameters():
        shape, keys = deepspeed.full_shape(parameter), ("weight", *MOMENTS)
        full = {f"{key}.{name}": torch.empty(shape) for key in keys}
        read(full)  # one parameter at a time, to save memory
        for key in keys:
            deepspeed.scatter_values(parameter, key, full[f"{key}.{name}"])
