"""Reads and writes files of whole weights: safetensors, and state dicts of `torch.save`."""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from unitransformer.config import ModelConfig
from unitransformer.files import open_atomically
from unitransformer.transformer import InitialWeights, Transformer

FIX = "give the size and the model options that it was made with"
# Parts that wrappers add to names: torch.compile, DDP, DeepSpeed, Lightning, FSDP1, activation
# checkpointing, and modules that hold the network. The backbone has no such part.
WRAPPERS = {"_orig_mod", "module", "_forward_module", "model", "_fsdp_wrapped_module"}
WRAPPERS |= {"_checkpoint_wrapped_module", "objective", "network"}
# Where training checkpoints hold the state dict.
NESTED_IN = ("state_dict", "model_state_dict", "model", "module")


def read_weights(path: Path, model: ModelConfig) -> InitialWeights:
    """Returns the weights in `path` as initial weights of a network, read one at a time.

    Args:
        path: a state dict of the plain model or of this one, as `.safetensors` or written by
            `torch.save`; nothing in it is executed. Its names may have prefixes of wrappers or of
            the module that held it, and it may be part of a checkpoint of Lightning.

    Raises:
        ValueError: the file is not a state dict, or not of this model; names the first mismatch.
    """
    with torch.device("meta"):
        network = Transformer(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    tensors, names = _unwrap(_open(path), path, first=next(iter(wanted)))
    optional = {"pe.pe"} | ({"lm_head.weight"} if model.tied_head else set())
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in wanted:
            raise ValueError(f"init-from {path} has {names[name]}, which the model lacks; {FIX}")
        if name not in tensors:
            if name in optional:
                continue
            raise ValueError(f"init-from {path} lacks {name}, which the model has; {FIX}")
        shape = tuple(tensors[name].shape)
        if shape != wanted[name]:
            raise ValueError(
                f"init-from {path}: {name} is {shape} there and {wanted[name]} in the model; {FIX}"
            )
        if not tensors[name].is_floating_point():
            raise ValueError(f"init-from {path}: {name} is not floating-point; {FIX}")
    head = tensors.get("lm_head.weight") if model.tied_head else None
    if head is not None and not torch.equal(head, tensors["embedding.lut.weight"]):
        raise ValueError(
            f"init-from {path} has a separate head; model.tied-head is true: set it to false"
        )
    # A copy, because the file may be replaced during training.
    return lambda name, _: tensors[name].to(torch.float32, copy=True)


def _unwrap(
    tensors: Mapping[str, Tensor], path: Path, *, first: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and their names in the file, by names without the parts of wrappers.

    What precedes the name `first`, which every network has, is also left out of all names.
    """
    plain_names = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in tensors
    }
    found = {name for name in plain_names.values() if f".{name}".endswith(f".{first}")}
    if len(found) > 1 and first not in found:
        listed = " and ".join(sorted(found))
        raise ValueError(f"init-from {path} holds several networks ({listed}); save one of them")
    prefix = found.pop().removesuffix(first) if len(found) == 1 else ""
    names: dict[str, str] = {}
    for name, plain in plain_names.items():
        plain = plain.removeprefix(prefix)
        if plain in names:
            raise ValueError(
                f"init-from {path} has {names[plain]} and {name}, which are both {plain} without "
                "their prefixes; leave one of them out"
            )
        names[plain] = name
    return {plain: tensors[name] for plain, name in names.items()}, names


def _open(path: Path) -> Mapping[str, Tensor]:
    """Returns memory-mapped tensors, which are read when they are used."""
    try:
        if path.suffix == ".safetensors":
            file: Any = safetensors.safe_open(path, framework="pt", device="cpu")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        mmap = zipfile.is_zipfile(path)  # files of old versions of torch are not
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        while isinstance(tensors, Mapping):
            inner = (tensors[name] for name in NESTED_IN if isinstance(tensors.get(name), Mapping))
            if (nested := next(inner, None)) is None:
                break
            tensors = nested
        if isinstance(tensors, Mapping) and all(
            isinstance(name, str) and isinstance(values, Tensor) for name, values in tensors.items()
        ):
            return tensors
        raise ValueError("it is not a plain state dict")
    except Exception as error:  # for a damaged file the readers raise exceptions of any type
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        fix = "give a .safetensors file or a state dict written by torch.save"
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            reason = "it holds more than tensors, which is not executed"
            fix = "save its state dict alone with torch.save"
        elif path.suffix != ".safetensors" and not isinstance(error, OSError | ValueError):
            reason = "it is damaged or something else"  # torch's reasons are about its own code
        raise ValueError(f"init-from {path} cannot be read ({reason}); {fix}") from error


def write_weights(
    weights: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    path: Path,
    metadata: Mapping[str, str],
) -> None:
    """Writes a float32 safetensors file atomically, with one tensor in memory at a time.

    The format: length of the header, 8 bytes; the header, JSON; the values, little-endian
    (https://huggingface.co/docs/safetensors).

    Args:
        weights: tensors of the right shapes, in the order of the file.
        read: returns the values of a tensor by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in weights.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open_atomically(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in weights:
            values = read(name).detach().to(torch.float32).contiguous().numpy()
            file.write(values.astype("<f4", copy=False).data)
