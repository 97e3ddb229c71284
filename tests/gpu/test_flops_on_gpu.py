"""Compares FLOP counts with torch's counter on CUDA, and a product with the published peak."""

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unitransformer.costs.gpus import find_gpu, why_unknown

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("is_causal", [False, True])
def test_flash_attention_is_counted_as_three_and_a_half_forward_passes(is_causal: bool) -> None:
    """The backward pass has five products, with recomputed scores; the mask halves nothing."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("torch has no flash attention for GPUs older than the A100")
    q, k, v = (
        torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.float16, requires_grad=True)
        for _ in range(3)
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), FlopCounterMode(display=False) as counter:
        functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal).sum().backward()
    forward = 4 * (2 * 2 * 128 * 128 * 64)
    assert counter.get_total_flops() == 3.5 * forward


def test_a_large_matrix_product_approaches_the_dense_peak_of_the_table() -> None:
    name = torch.cuda.get_device_name()
    gpu = find_gpu(name)
    if gpu is None:
        pytest.skip(why_unknown(name))
    size, repeats = 8192, 20
    a = torch.randn(size, size, device="cuda", dtype=torch.float16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(repeats):  # an idle GPU raises its clock meanwhile
        a @ a
    start.record()
    for _ in range(repeats):
        a @ a
    end.record()
    torch.cuda.synchronize()
    flops_per_s = repeats * 2 * size**3 / (start.elapsed_time(end) / 1e3)
    # Below a half if the peak included sparsity; GeForce may clock above its rating.
    assert 0.5 < flops_per_s / gpu.dense_flops_per_s["float16"] < 1.25
