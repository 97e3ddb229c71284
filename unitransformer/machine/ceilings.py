"""Measures what one rank reaches at best, in about a second: matrix products by dtype, and copying.

M rows | K columns of the input | N columns of the output

Every rank measures at the same time, with the threads of its job. The products are the three of a
linear layer, x W^T, g W and g^T x: a library can be ten times slower at one of them than at
another. Inputs are random, as weights are: zeros would let a GPU clock higher.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from unitransformer.config import Precision
from unitransformer.costs.gpus import MATMUL_DTYPE
from unitransformer.machine.calibration import Ceiling, WorkSamples
from unitransformer.machine.host import last_level_cache_bytes, memory_bytes
from unitransformer.machine.timing import Clock, choose_clock, first_sample, repeat, wait_for_others

Dtype = Literal["float32", "tf32", "float16", "bfloat16"]
Layout = Literal["x W^T", "g W", "g^T x"]
MatmulShape = tuple[int, int, int]  # M, K, N

# Squares, and shapes of transformers, smallest first.
CPU_SHAPES: tuple[MatmulShape, ...] = (
    (256, 256, 256),
    (512, 512, 512),
    (1024, 1024, 1024),
    (512, 768, 3072),
)
CUDA_SHAPES: tuple[MatmulShape, ...] = (
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (8192, 2048, 8192),
    (8192, 8192, 8192),
    (8192, 4096, 16384),
)
NUM_FINALISTS = 3  # products measured again; one sample does not show which is the best
MAX_CALL_SHARE = 1 / 8  # of the budget
DISTINCT_VALUES = 2**16  # repeated, since generating takes longer than multiplying
COPY_SHARE = 0.25  # of the budget


def dtype_of(precision: Precision, device: torch.device) -> Dtype:
    """Returns the dtype of a run's matrix products: TF32 for float32 where torch allows it."""
    dtype = MATMUL_DTYPE[precision]
    allows_tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == "float32" and allows_tf32 else dtype


def measure_ceiling(
    device: torch.device, dtype: Dtype, *, budget_s: float, clock: Clock | None = None
) -> Ceiling:
    """Measures what this rank reaches at `dtype`; every rank of a process group must call it.

    Changes no random state and frees its memory. The first call on a GPU also loads kernels, which
    takes longer than `budget_s` and is not counted. Tests give another `clock` than the device's.

    Raises:
        ValueError: a budget that is not above 0.
        RuntimeError: a clock that does not advance, or too little memory for the smallest product.
    """
    if not 0 < budget_s < math.inf:
        raise ValueError(f"budget_s is {budget_s}; it must be above 0, such as 0.5")
    clock = clock or choose_clock(device)
    started_s = time.monotonic()
    with _matmul_settings(device, dtype):
        # All ranks at once, because a job gets what its ranks reach together.
        wait_for_others(device)
        try:
            matmul = _measure_matmul(device, dtype, budget_s * (1 - COPY_SHARE), clock)
        finally:
            wait_for_others(device)  # also if this rank failed
        copy = _measure_copy(device, budget_s * COPY_SHARE, clock)
    return Ceiling(
        device=device_name(device),
        dtype=dtype,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        matmul=matmul,
        copy=copy,
        elapsed_s=time.monotonic() - started_s,
    )


def device_name(device: torch.device) -> str:
    """Returns the driver's name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def why_not_measured(device: torch.device) -> dict[Dtype, str | None]:
    """Returns for every dtype why it is not measured on `device`; None if it is."""
    reasons: dict[Dtype, str | None] = dict.fromkeys(get_args(Dtype))
    if device.type == "cpu":
        reasons["tf32"] = "not available on a CPU"
        reasons["float16"] = "not used for training on a CPU"
        return reasons
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        reasons["bfloat16"] = "the GPU emulates it"
    if torch.version.hip is not None:
        reasons["tf32"] = "torch does not report whether an AMD GPU uses it"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reasons["tf32"] = "needs compute capability 8.0"
    return reasons


@contextmanager
def _matmul_settings(device: torch.device, dtype: Dtype) -> Iterator[None]:
    """Applies the settings of a dtype; restores them and frees memory afterwards."""
    before = torch.get_float32_matmul_precision()
    if dtype in ("tf32", "float32") and device.type == "cuda":
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with torch.no_grad(), on_device:
            yield
    finally:
        if torch.get_float32_matmul_precision() != before:
            torch.set_float32_matmul_precision(before)
        if device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()


def _measure_matmul(
    device: torch.device, dtype: Dtype, budget_s: float, clock: Clock
) -> tuple[WorkSamples, ...]:
    """Measures every product that the budget allows once, then the best few repeatedly."""
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    torch_dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    for work in _products(shapes[0], torch_dtype, device).values():
        clock(work, 1)  # loads libraries and kernels before the budget starts
    deadline_s = time.monotonic() + budget_s
    tried = _try_all(device, torch_dtype, shapes, budget_s, clock)
    if not tried:
        raise RuntimeError(f"{device_name(device)} lacks memory for a product of {shapes[0]}")
    best = sorted(tried, key=lambda product: product.rate, reverse=True)[:NUM_FINALISTS]
    for done, product in enumerate(best):
        until_s = time.monotonic() + (deadline_s - time.monotonic()) / (len(best) - done)
        work = _products(product.shape, torch_dtype, device)[product.layout]
        product.seconds += repeat(work, product.calls, until_s, clock)
    return tuple(
        WorkSamples(
            name=f"{' x '.join(map(str, product.shape))}, {product.layout}",
            work=_flops(product.shape) * product.calls,
            seconds=tuple(product.seconds),
        )
        for product in tried
    )


@dataclass(kw_only=True)
class _Product:
    shape: MatmulShape
    layout: Layout
    calls: int
    seconds: list[float]

    @property
    def rate(self) -> float:
        """FLOP/s of the first sample."""
        return _flops(self.shape) * self.calls / self.seconds[0]


def _try_all(
    device: torch.device,
    dtype: torch.dtype,
    shapes: tuple[MatmulShape, ...],
    budget_s: float,
    clock: Clock,
) -> list[_Product]:
    tried: list[_Product] = []
    last: dict[Layout, _Product] = {}
    halfway_s = time.monotonic() + budget_s / 2
    for shape in shapes:
        m, k, n = shape
        size = 2 * (m * k + k * n + m * n) * dtype.itemsize
        if device.type == "cuda" and 2 * size >= _free_bytes(device):
            continue
        for layout, work in _products(shape, dtype, device).items():
            # Predicted from a smaller product: one call to warm up, one to measure.
            expected_s = 2 * _flops(shape) / last[layout].rate if layout in last else 0.0
            if expected_s > budget_s * MAX_CALL_SHARE or (tried and time.monotonic() > halfway_s):
                continue
            calls, sample_s = first_sample(work, clock)
            last[layout] = _Product(shape=shape, layout=layout, calls=calls, seconds=[sample_s])
            tried.append(last[layout])
    return tried


def _flops(shape: MatmulShape) -> int:
    return 2 * math.prod(shape)  # a multiplication and an addition


def _products(
    shape: MatmulShape, dtype: torch.dtype, device: torch.device
) -> dict[Layout, Callable[[], object]]:
    """Returns the three products of a linear layer, each with its own output."""
    m, k, n = shape
    x_MK, g_MN, w_NK = (_random(*size, dtype, device) for size in ((m, k), (m, n), (n, k)))
    y_MN, gx_MK, gw_NK = (torch.empty_like(like) for like in (g_MN, x_MK, w_NK))
    return {
        "x W^T": lambda: torch.mm(x_MK, w_NK.T, out=y_MN),
        "g W": lambda: torch.mm(g_MN, w_NK, out=gx_MK),
        "g^T x": lambda: torch.mm(g_MN.T, x_MK, out=gw_NK),
    }


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns (rows, columns) normal values; leaves the global generators alone."""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(DISTINCT_VALUES, generator=generator, device=device).to(dtype)
    repeats = math.ceil(rows * columns / DISTINCT_VALUES)
    return values.repeat(repeats)[: rows * columns].view(rows, columns)


def _measure_copy(device: torch.device, budget_s: float, clock: Clock) -> WorkSamples:
    """Counts bytes read and bytes written, as STREAM does (https://www.cs.virginia.edu/stream).

    A CPU may also read what it overwrites, so its bus may carry half as much again.
    """
    deadline_s = time.monotonic() + budget_s
    size = _copy_bytes(device)
    source = torch.full((size,), 1, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work = functools.partial(target.copy_, source)
    calls, sample_s = first_sample(work, clock)
    seconds = (sample_s, *repeat(work, calls, deadline_s, clock))
    return WorkSamples(name=f"copy of {size} bytes", work=2 * size * calls, seconds=seconds)


def _copy_bytes(device: torch.device) -> int:
    """Returns a size beyond the caches: twice their sum on a CPU, 1 GiB on a GPU, if it fits."""
    if device.type == "cuda":
        wanted, free = 2**30, _free_bytes(device)
    else:
        wanted = max(2**26, min(2**30, 2 * (last_level_cache_bytes() or 2**27)))
        free = (memory_bytes() or 2**33) // 4  # other ranks need as much
    return min(wanted, free // 8)


def _free_bytes(device: torch.device) -> int:
    """Returns free bytes of the GPU, including those that torch has reserved."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
