"""Files of whole weights by plain parameter name: read to start from, written by `export`."""

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from unitransformer.config import ModelConfig
from unitransformer.files import open_atomically
from unitransformer.transformer import InitialWeights, Transformer

CURE = "give the size and the model options it was made with"


def read_weights(path: Path, model: ModelConfig) -> InitialWeights:
    """Weights of `path`, read one at a time, as first values of a network.

    Args:
        path: a state dict of the plain model or of this one, `.safetensors` or what `torch.save`
            writes; nothing in it is executed.

    Raises:
        ValueError: not such a file, or one of another model: the first name that does not fit.
    """
    tensors = _open(path)
    with torch.device("meta"):
        network = Transformer(model)
    shapes = {name: tuple(values.shape) for name, values in network.state_dict().items()}
    found = {name: tensors.shape(name) for name in tensors.names}
    optional = {"pe.pe"} | ({"lm_head.weight"} if model.tied_head else set())
    for name in sorted(shapes.keys() | found.keys()):
        if name not in found and name not in optional:
            raise ValueError(f"init-from {path} has no {name}; the model has; {CURE}")
        if name not in shapes:
            raise ValueError(f"init-from {path} has {name}; the model has not; {CURE}")
        if name in found and found[name] != shapes[name]:
            raise ValueError(
                f"init-from {path}: {name} is {found[name]} there and {shapes[name]} in the "
                f"model; {CURE}"
            )
        if name in found and not tensors.is_float(name):
            raise ValueError(f"init-from {path}: {name} holds no floating-point numbers; {CURE}")
    if model.tied_head and "lm_head.weight" in found:
        head, words = (tensors.read(name) for name in ("lm_head.weight", "embedding.lut.weight"))
        if not torch.equal(head, words):
            raise ValueError(
                f"init-from {path} has a head of its own; model.tied_head is true: set it to false"
            )
    # A copy: the file may be replaced while its weights are trained.
    return lambda name, _: tensors.read(name).to(torch.float32, copy=True)


class _SafeFile:
    """Tensors of a safetensors file, read when asked for."""

    def __init__(self, path: Path) -> None:
        opened: Any = safetensors.safe_open
        self.file: Any = opened(path, framework="pt", device="cpu")
        self.names: list[str] = list(self.file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())

    def is_float(self, name: str) -> bool:
        return bool(self.file.get_slice(name).get_dtype() in ("F64", "F32", "F16", "BF16"))

    def read(self, name: str) -> Tensor:
        values: Tensor = self.file.get_tensor(name)
        return values


class _PickledFile:
    """Tensors of a file that `torch.save` wrote, mapped into memory."""

    def __init__(self, path: Path) -> None:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError("it holds more than tensors; nothing in it is executed") from error
        if not isinstance(loaded, Mapping) or not all(
            isinstance(values, Tensor) for values in loaded.values()
        ):
            raise ValueError("it holds no plain state dict")
        self.tensors = loaded
        self.names = list(loaded)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def is_float(self, name: str) -> bool:
        return bool(self.tensors[name].is_floating_point())

    def read(self, name: str) -> Tensor:
        values: Tensor = self.tensors[name]
        return values


def _open(path: Path) -> _SafeFile | _PickledFile:
    try:
        return _SafeFile(path) if path.suffix == ".safetensors" else _PickledFile(path)
    except Exception as error:  # what the readers raise for a damaged file is anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"init-from {path} cannot be read ({reason}); "
            "give a .safetensors or a state dict that torch.save wrote"
        ) from error


def write_weights(
    weights: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    path: Path,
    about: Mapping[str, str],
) -> None:
    """Write a safetensors file of float32, whole or not at all, one tensor after the other.

    The format: length of the header, 8 bytes; the header, JSON; the numbers, little-endian
    (https://huggingface.co/docs/safetensors).

    Args:
        weights: in their order; of each only the shape counts.
        read: the values of one of them.
        about: its metadata.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **about}}
    end = 0
    for name, values in weights.items():
        begin, end = end, end + 4 * values.numel()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open_atomically(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in weights:
            numbers = read(name).detach().to(torch.float32).contiguous().numpy()
            file.write(numbers.astype("<f4", copy=False).data)
