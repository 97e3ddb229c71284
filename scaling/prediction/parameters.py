"""Lists the parameters of a network with their shapes, as strategies see them.

D width | F feedforward width | V classes | P values of a patch
"""

import functools
import math
from collections.abc import Iterable

from unitransformer.config import ModelConfig

Parameter = tuple[str, tuple[int, ...]]  # name and shape


@functools.lru_cache(maxsize=256)
def layer_parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """Returns the parameters of one layer, in the order in which their gradients are ready."""
    width, hidden = model.width, model.feedforward_width
    return (
        ("feedforward.fcn.3.bias", (width,)),
        ("feedforward.fcn.3.weight", (width, hidden)),
        ("feedforward.fcn.0.bias", (hidden,)),
        ("feedforward.fcn.0.weight", (hidden, width)),
        ("ln2.weight", (width,)),
        ("ln2.bias", (width,)),
        ("mha.out_proj.bias", (width,)),
        ("mha.out_proj.weight", (width, width)),
        ("mha.in_proj_bias", (3 * width,)),
        ("mha.in_proj_weight", (3 * width, width)),
        ("ln1.weight", (width,)),
        ("ln1.bias", (width,)),
    )


@functools.lru_cache(maxsize=256)
def head_parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """Returns what comes after the layers, by the order of gradients; without a tied matrix."""
    head: list[Parameter] = []
    if model.head_bias:
        head.append(("lm_head.bias", (model.num_classes,)))
    if not model.tied_head:
        head.append(("lm_head.weight", (model.num_classes, model.width)))
    if model.final_norm:
        head += [("final_norm.weight", (model.width,)), ("final_norm.bias", (model.width,))]
    return tuple(head)


@functools.lru_cache(maxsize=256)
def embedding_parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """Returns what comes before the layers, by the order of gradients."""
    if model.patch_size is None:
        return (("embedding.lut.weight", (model.num_classes, model.width)),)
    return (
        ("class_embedding", (1, 1, model.width)),
        ("linear_mapper.bias", (model.width,)),
        ("linear_mapper.weight", (model.width, model.num_channels * model.patch_size**2)),
    )


def outer_parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """Returns all parameters outside of layers."""
    return (*head_parameters(model), *embedding_parameters(model))


@functools.lru_cache(maxsize=256)
def gradient_order(model: ModelConfig) -> tuple[Parameter, ...]:
    """Returns all parameters in the order in which a backward pass has their gradients ready."""
    layers = layer_parameters(model) * model.num_layers
    return (*head_parameters(model), *layers, *embedding_parameters(model))


def size_of(parameter: Parameter) -> int:
    """Returns the numbers of one parameter."""
    return math.prod(parameter[1])


def count_numbers(parameters: Iterable[Parameter]) -> int:
    return sum(map(size_of, parameters))


def count_padded_rows(parameters: tuple[Parameter, ...], num_ranks: int) -> int:
    """Returns the numbers after each first dimension is padded to a multiple of the ranks.

    So does FSDP2, whose shards are rows: `fully_shard` of torch 2.13.
    """
    return sum(
        math.ceil(shape[0] / num_ranks) * num_ranks * math.prod(shape[1:])
        for _, shape in parameters
    )


def count_padded_flat(parameters: tuple[Parameter, ...], multiple: int) -> int:
    """Returns the numbers after each parameter is padded to a multiple, as ZeRO-3 does."""
    return sum(math.ceil(math.prod(shape) / multiple) * multiple for _, shape in parameters)


def is_matrix(parameter: Parameter) -> bool:
    """Whether AdamW decays it: it has two dimensions that are larger than one."""
    return sum(size > 1 for size in parameter[1]) >= 2
