"""Tests which peak applies to a GPU and precision; an ambiguous one is missing."""

import pytest

from unitransformer.costs.peaks import CPU, find_peak

A100 = "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize(
    ("precision", "allows_tf32", "dtype", "tflops"),
    [
        ("32-true", False, "float32", 19.5),
        ("32-true", True, "tf32", 156),
        ("bf16-mixed", False, "bfloat16", 312),
        ("bf16-true", True, "bfloat16", 312),
        ("16-mixed", None, "float16", 312),
    ],
)
def test_a_precision_uses_the_peak_of_the_dtype_of_its_products(
    precision: str, allows_tf32: bool | None, dtype: str, tflops: float
) -> None:
    peak = find_peak(A100, precision, allows_tf32=allows_tf32)
    assert (peak.dtype, peak.flops_per_s, peak.reason) == (dtype, tflops * 1e12, None)
    assert peak.source is not None


@pytest.mark.parametrize("allows_tf32", [True, False, None])
def test_a_gpu_older_than_tf32_computes_float32_whatever_the_switch(
    allows_tf32: bool | None,
) -> None:
    peak = find_peak("Tesla T4", "32-true", allows_tf32=allows_tf32)
    assert (peak.dtype, peak.flops_per_s) == ("float32", 8.1e12)


@pytest.mark.parametrize(
    ("device_name", "precision", "allows_tf32", "message"),
    [
        ("NVIDIA H20", "bf16-mixed", False, "NVIDIA H20 is not in the table"),
        (A100 + " MIG 1g.10gb", "bf16-mixed", False, "slice of a GPU"),
        (CPU, "32-true", None, "a CPU has no published peak"),
        (CPU, "bf16-mixed", None, "a CPU has no published peak"),
        ("NVIDIA H200", "transformer-engine", False, "mixes fp8"),
        (CPU, "transformer-engine", None, "mixes fp8"),
        ("NVIDIA H200", "64-true", False, "does not say"),
        ("NVIDIA H200", "32-true", None, "not known whether TF32"),
        ("Tesla V100-SXM2-16GB", "bf16-mixed", False, "no published dense peak in bfloat16"),
        ("AMD Instinct MI300X", "32-true", True, "ROCm's own switches"),
    ],
)
def test_an_ambiguous_peak_is_missing_with_a_reason(
    device_name: str, precision: str, allows_tf32: bool | None, message: str
) -> None:
    peak = find_peak(device_name, precision, allows_tf32=allows_tf32)
    assert peak.flops_per_s is None
    assert peak.source is None
    assert peak.reason is not None
    assert message in peak.reason


def test_an_unknown_gpu_still_has_the_dtype_of_its_products() -> None:
    assert find_peak("NVIDIA H20", "bf16-mixed").dtype == "bfloat16"
    assert find_peak(CPU, "32-true").dtype == "float32"
