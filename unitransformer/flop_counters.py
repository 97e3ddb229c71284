"""Counts the forward pass of a network with the FLOP counters of other packages.

`python -m unitransformer.flop_counters` reads a run config as JSON and prints JSON: the true FLOPs
of one sample by network, and what each counter prints. Nothing is allocated or computed: tensors
are on the meta device, or fake ones on the CPU where a counter reads the CPU's kernels.

B batch | T positions | D width
"""

import contextlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from unitransformer.config import ModelConfig, RunConfig, from_dict
from unitransformer.costs.flops import flops_per_sample
from unitransformer.parallel.deepspeed import prepare_deepspeed
from unitransformer.transformer import PatchEncoding, Transformer

Count = Callable[[nn.Module, Tensor], float]


class PlainLayer(nn.Module):
    """A pre-norm layer made of PyTorch's own modules."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(model.width) for _ in range(2))
        self.attention = nn.MultiheadAttention(model.width, model.num_heads, batch_first=True)
        self.feedforward = nn.Sequential(
            nn.Linear(model.width, model.feedforward_width),
            nn.ReLU() if model.activation == "relu" else nn.GELU(),
            nn.Linear(model.feedforward_width, model.width),
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        normed = self.norms[0](x_BTD)
        x_BTD = x_BTD + self.attention(normed, normed, normed, need_weights=False)[0]
        out: Tensor = x_BTD + self.feedforward(self.norms[1](x_BTD))
        return out


class PlainNetwork(nn.Module):
    """The shape of `Transformer` as most people write it; every layer computes all positions."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding: nn.Module = nn.Embedding(model.num_classes, model.width)
        if (patch := model.patch_size) is not None:
            # Equal to a convolution, which cannot be traced on the meta device.
            pixels = nn.Linear(model.num_channels * patch**2, model.width)
            self.embedding = nn.Sequential(PatchEncoding(patch), pixels)
        self.layers = nn.Sequential(*(PlainLayer(model) for _ in range(model.num_layers)))
        self.head = nn.Linear(model.width, model.num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        x_BTD = self.embedding(inputs)
        if inputs.ndim == 4:  # images: a class token of zeros comes before the patches
            x_BTD = torch.cat([torch.zeros_like(x_BTD[:, :1]), x_BTD], dim=1)
        states = self.layers(x_BTD)
        logits: Tensor = self.head(states[:, 0] if inputs.ndim == 4 else states)
        return logits


SUITE_REASON = (
    "a training step by 3: last layer and head only at predicted positions, images get no gradient"
)
NETWORKS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "suite": Transformer,
    "plain": PlainNetwork,
}


def with_torch(network: nn.Module, inputs: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        network(inputs)
    return float(counter.get_total_flops())


def with_deepspeed(network: nn.Module, inputs: Tensor) -> float:
    prepare_deepspeed("cpu")
    from deepspeed.profiling.flops_profiler import get_model_profile

    options = {"print_profile": False, "as_string": False}
    return float(get_model_profile(network, args=[inputs], **options)[0])


def with_fvcore(network: nn.Module, inputs: Tensor) -> float:
    from fvcore.nn import FlopCountAnalysis

    return float(FlopCountAnalysis(network, inputs).total())


def with_ptflops(network: nn.Module, inputs: Tensor, backend: str = "pytorch") -> float:
    from ptflops import get_model_complexity_info

    options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
    build = {"input_constructor": lambda _: inputs}
    return float(get_model_complexity_info(network, (1,), **build, **options)[0])


def with_thop(network: nn.Module, inputs: Tensor, other: str = "ultralytics-thop") -> float:
    if installed_version(other) is not None:
        raise RuntimeError(f"{other} is installed too, and both are imported as thop")
    from thop import profile

    return float(profile(network, inputs=(inputs,), verbose=False)[0])


def with_calflops(network: nn.Module, inputs: Tensor) -> float:
    from calflops import calculate_flops

    # It moves the network to the device where it is, which fake tensors refuse.
    network.__dict__["_apply"] = lambda *_: network
    options = {"print_results": False, "output_as_string": False}
    return float(calculate_flops(network, args=[inputs], **options)[0])


def with_torchprofile(network: nn.Module, inputs: Tensor) -> float:
    from torchprofile import profile_macs

    return cast(float, profile_macs(network, inputs))


def with_torchinfo(network: nn.Module, inputs: Tensor) -> float:
    from torchinfo import summary

    return float(summary(network, input_data=[inputs], verbose=0).total_mult_adds)


class Counter(NamedTuple):
    """A counter of another package."""

    name: str
    package: str  # as pip names it
    unit: Literal["FLOP", "MAC"]  # of what it prints; a multiply-add (MAC) is two FLOPs
    run: Count
    device: Literal["meta", "cpu"]  # of the tensors; "cpu": it sees which kernels run
    reason: str  # for the difference from the true number


# name, package, unit, function, device, reason
# fmt: off
COUNTERS = (
    Counter("FlopCounterMode, meta device", "torch", "FLOP", with_torch, "meta",
            "attention is two matrix products there"),
    Counter("FlopCounterMode, CPU", "torch", "FLOP", with_torch, "cpu",
            "no formula for the attention kernel of CPUs"),
    Counter("deepspeed.get_model_profile", "deepspeed", "FLOP", with_deepspeed, "cpu",
            "adds norms and activations"),
    Counter("torchprofile.profile_macs", "torchprofile", "MAC", with_torchprofile, "meta",
            "adds norms"),
    Counter("thop.profile", "ultralytics-thop", "MAC", partial(with_thop, other="thop"), "meta",
            "adds norms"),
    Counter("ptflops, pytorch backend", "ptflops", "MAC", with_ptflops, "cpu",
            "rules by exact type, none for a subclass of nn.Linear; adds norms and activations"),
    Counter("ptflops, aten backend", "ptflops", "MAC", partial(with_ptflops, backend="aten"), "cpu",
            "no rule for the attention kernel of CPUs; adds norms and activations"),
    Counter("fvcore.nn.FlopCountAnalysis", "fvcore", "MAC", with_fvcore, "meta",
            "no rule for scaled_dot_product_attention; adds norms"),
    Counter("calflops.calculate_flops", "calflops", "FLOP", with_calflops, "cpu",
            "does not see scaled_dot_product_attention; adds activations"),
    Counter("thop.profile", "thop", "MAC", with_thop, "meta",
            "rules by exact type, none for nn.MultiheadAttention or a subclass of nn.Linear"),
    Counter("torchinfo.summary", "torchinfo", "MAC", with_torchinfo, "meta",
            "parameters by samples, not by positions; no attention"),
)
# fmt: on


def count_all(config: RunConfig) -> dict[str, Any]:
    """Returns the true FLOPs of one sample by network, and a row for each counter."""
    # The backward pass of a matrix product is two products.
    ours = dict.fromkeys(NETWORKS, flops_per_sample(config, causal=False) / 3)
    suite = {"name": "matmul / 3", "package": "this suite", "version": "", "unit": "FLOP"}
    return {
        "true": {name: count(with_torch, config, name, "meta") for name in NETWORKS},
        "rows": [
            suite | {"counted": ours, "reason": SUITE_REASON},
            *(_row(counter, config) for counter in COUNTERS),
        ],
    }


def count(how: Count, config: RunConfig, name: str, device: str) -> float:
    """Counts the forward pass of one sample through a network of `NETWORKS`."""
    model = config.model
    with torch.device("meta"):
        network = NETWORKS[name](model).eval()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if device == "cpu":
            stack.enter_context(FakeTensorMode())
            _move_to_cpu(network)
        if model.image_size is None:
            inputs = torch.zeros(1, config.sequence_length, dtype=torch.long, device=device)
        else:
            shape = (1, model.num_channels, model.image_size, model.image_size)
            inputs = torch.zeros(shape, device=device)
        # What a fake tensor meets first it decomposes in Python; some counters would count that.
        network(inputs)
        return how(network, inputs)


def _move_to_cpu(network: nn.Module) -> None:
    """Replaces parameters and buffers on the meta device; `to_empty` cannot make fake tensors."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape)


def _row(counter: Counter, config: RunConfig) -> dict[str, Any]:
    row: dict[str, Any] = {"name": counter.name, "package": counter.package, "unit": counter.unit}
    row |= {"reason": counter.reason, "version": installed_version(counter.package)}
    if row["version"] is None:
        return row
    try:
        # A counter leaves marks on the network, so each one gets its own.
        counted = {name: count(counter.run, config, name, counter.device) for name in NETWORKS}
    except Exception as error:  # of a package in any version: the other rows are still right
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return row | {"counted": counted}


def installed_version(package: str) -> str | None:
    """Returns the installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Counts, prints the result and returns the exit code."""
    config = from_dict(RunConfig, json.load(sys.stdin))
    # Standard output holds the answer alone: some counters print there.
    with contextlib.redirect_stdout(sys.stderr):
        answer = count_all(config)
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
