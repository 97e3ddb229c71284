"""What one rank can do at best: matrix products by dtype, and copying; a second or less.

M rows | K columns of the input | N columns of the output

Every rank measures at the same time, with its job's threads, beside its neighbours. Products are
the three of a linear layer, x W^T, g W and g^T x: a library can be ten times slower at one of them
than at another. Values are drawn at random, as weights are: zeros would let a GPU clock higher.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from unitransformer.config import Precision
from unitransformer.costs.peaks import MATMUL_DTYPE
from unitransformer.machine.calibration import Ceiling, WorkSamples
from unitransformer.machine.host import last_level_cache_bytes, memory_bytes
from unitransformer.machine.timing import Clock, choose_clock, first_sample, repeat, wait_for_others

Dtype = Literal["float32", "tf32", "float16", "bfloat16"]
Layout = Literal["x W^T", "g W", "g^T x"]
MatmulShape = tuple[int, int, int]  # M, K, N

# Squares, and what transformers multiply, smallest first.
CPU_SHAPES: tuple[MatmulShape, ...] = (
    (256, 256, 256),
    (512, 512, 512),
    (1024,) * 3,
    (512, 768, 3072),
)
CUDA_SHAPES: tuple[MatmulShape, ...] = (
    *((2048, 2048, 2048), (4096, 4096, 4096), (8192, 2048, 8192)),
    *((8192, 8192, 8192), (8192, 4096, 16384)),
)
FINALISTS = 3  # one sample does not tell which product is the best
LARGEST_PART = 8  # one call may take an eighth of the budget
DISTINCT_VALUES = 2**16  # then they repeat: drawing takes longer than multiplying
COPY_SHARE = 0.25  # of the budget


def dtype_of(precision: Precision, device: torch.device) -> Dtype:
    """What a run computes matrix products in: TF32 in place of float32 where torch allows it."""
    dtype = MATMUL_DTYPE[precision]
    allows_tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == "float32" and allows_tf32 else dtype


def measure_ceiling(
    device: torch.device,
    precision: Precision,
    *,
    budget_s: float = 0.5,
    shapes: Sequence[MatmulShape] = (),
) -> Ceiling:
    """What this rank can reach at `precision`, now. Where a process group is, all ranks call this.

    Random states are left alone, and no memory is kept. A first call on a GPU also loads kernels,
    which takes longer than `budget_s` and is not counted.

    Args:
        shapes: (M, K, N) of linear layers to try beside the usual ones.

    Raises:
        ValueError: a budget that is not above 0.
        RuntimeError: a clock that stands still, or a device too full for the smallest product.
    """
    return measure_dtype(device, dtype_of(precision, device), budget_s=budget_s, shapes=shapes)


def measure_dtype(
    device: torch.device,
    dtype: Dtype,
    *,
    budget_s: float,
    shapes: Sequence[MatmulShape] = (),
    clock: Clock | None = None,
) -> Ceiling:
    """As `measure_ceiling`, for one of "float32", "tf32", "float16", "bfloat16"."""
    if not 0 < budget_s < math.inf:
        raise ValueError(f"budget_s is {budget_s}; it must be above 0, as 0.5")
    clock = clock or choose_clock(device)
    usual = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    ordered = sorted({*usual, *shapes}, key=math.prod)
    started_s = time.monotonic()
    with _left_as_found(device, dtype):
        # All at once: the job gets what its ranks reach together, not what one reaches alone.
        wait_for_others(device)
        try:
            matmul = _measure_matmul(device, dtype, ordered, budget_s * (1 - COPY_SHARE), clock)
        finally:
            wait_for_others(device)  # one that fails keeps nobody waiting
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
    """As the driver prints it; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def why_not_measured(device: torch.device) -> dict[Dtype, str | None]:
    """Every dtype, and why it is not measured on `device`; None where it is."""
    reasons: dict[Dtype, str | None] = dict.fromkeys(get_args(Dtype))
    if device.type == "cpu":
        reasons["tf32"] = "a CPU has none"
        reasons["float16"] = "no run trains in it on a CPU"
        return reasons
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        reasons["bfloat16"] = "the GPU emulates it"
    if torch.version.hip is not None:
        reasons["tf32"] = "torch does not tell whether an AMD GPU uses it"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reasons["tf32"] = "GPUs have it from compute capability 8.0 on"
    return reasons


@contextmanager
def _left_as_found(device: torch.device, dtype: Dtype) -> Iterator[None]:
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


# ------------------------------------------------------------------------------ matrix products


def _measure_matmul(
    device: torch.device, dtype: Dtype, shapes: Sequence[MatmulShape], budget_s: float, clock: Clock
) -> tuple[WorkSamples, ...]:
    """A sample of every product that the budget allows, then of the best few alone."""
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    for work in _products(shapes[0], kind, device).values():
        clock(work, 1)  # libraries start and kernels are loaded before the time begins
    deadline_s = time.monotonic() + budget_s
    tried = _try_all(device, kind, shapes, budget_s, clock)
    if not tried:
        raise RuntimeError(f"{device_name(device)} is too full for a product of {shapes[0]}")
    best = sorted(tried, key=lambda product: product.rate, reverse=True)[:FINALISTS]
    for done, product in enumerate(best):
        until_s = time.monotonic() + (deadline_s - time.monotonic()) / (len(best) - done)
        work = _products(product.shape, kind, device)[product.layout]
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
    kind: torch.dtype,
    shapes: Sequence[MatmulShape],
    budget_s: float,
    clock: Clock,
) -> list[_Product]:
    tried: list[_Product] = []
    last: dict[Layout, _Product] = {}
    halfway_s = time.monotonic() + budget_s / 2
    for shape in shapes:
        m, k, n = shape
        if not _fits(2 * (m * k + k * n + m * n) * kind.itemsize, device):
            continue
        for layout, work in _products(shape, kind, device).items():
            # A smaller product tells how long this one takes: warming up, then a sample.
            expected_s = 2 * _flops(shape) / last[layout].rate if layout in last else 0.0
            if expected_s > budget_s / LARGEST_PART or (tried and time.monotonic() > halfway_s):
                continue
            calls, sample_s = first_sample(work, clock)
            last[layout] = _Product(shape=shape, layout=layout, calls=calls, seconds=[sample_s])
            tried.append(last[layout])
    return tried


def _flops(shape: MatmulShape) -> int:
    return 2 * math.prod(shape)  # a multiplication and an addition


def _products(
    shape: MatmulShape, kind: torch.dtype, device: torch.device
) -> dict[Layout, Callable[[], object]]:
    """The three products of a linear layer, each into memory of its own."""
    m, k, n = shape
    x_MK, g_MN, w_NK = (_draw(*size, kind, device) for size in ((m, k), (m, n), (n, k)))
    y_MN, gx_MK, gw_NK = (torch.empty_like(like) for like in (g_MN, x_MK, w_NK))
    return {
        "x W^T": lambda: torch.mm(x_MK, w_NK.T, out=y_MN),
        "g W": lambda: torch.mm(g_MN, w_NK, out=gx_MK),
        "g^T x": lambda: torch.mm(g_MN.T, x_MK, out=gw_NK),
    }


def _draw(rows: int, columns: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) normal values from a generator of their own."""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(DISTINCT_VALUES, generator=generator, device=device).to(kind)
    repeats = math.ceil(rows * columns / DISTINCT_VALUES)
    return values.repeat(repeats)[: rows * columns].view(rows, columns)


# ------------------------------------------------------------------------------------- copying


def _measure_copy(device: torch.device, budget_s: float, clock: Clock) -> WorkSamples:
    """Bytes read and bytes written both count, as in STREAM (https://www.cs.virginia.edu/stream).

    A CPU may read what it is about to overwrite first: the bus can carry half as much again.
    """
    deadline_s = time.monotonic() + budget_s
    size = _copy_bytes(device)
    source = torch.full((size,), 1, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def work() -> object:
        return target.copy_(source)

    calls, sample_s = first_sample(work, clock)
    seconds = (sample_s, *repeat(work, calls, deadline_s, clock))
    return WorkSamples(name=f"copy of {size} bytes", work=2 * size * calls, seconds=seconds)


def _copy_bytes(device: torch.device) -> int:
    """Well above the caches: twice all of them on a CPU, 1 GiB on a GPU; less if that is full."""
    if device.type == "cuda":
        wanted, free = 2**30, _free_bytes(device)
    else:
        wanted = max(2**26, min(2**30, 2 * (last_level_cache_bytes() or 2**27)))
        free = (memory_bytes() or 2**33) // 4  # other ranks take as much
    return min(wanted, free // 8)


def _fits(size: int, device: torch.device) -> bool:
    return device.type != "cuda" or 2 * size < _free_bytes(device)


def _free_bytes(device: torch.device) -> int:
    """On the GPU, and in what torch has set aside there."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle
