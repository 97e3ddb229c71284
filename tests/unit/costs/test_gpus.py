"""Tests that a driver name gives the dense peaks of its GPU, and which one applies to a run."""

from itertools import pairwise
from typing import get_args

import pytest

from unitransformer.costs.gpus import (
    CPU,
    GPUS,
    REFUSED,
    Dtype,
    Gpu,
    find_gpu,
    find_peak,
    why_unknown,
)

# What the driver prints, and the TFLOP/s of bfloat16 (float16 where there is none), dense.
PRINTED = {
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-PCIE-16GB": 112,
    "Tesla V100-PCIE-32GB": 112,
    "Tesla V100S-PCIE-32GB": 130,
    "Tesla T4": 65,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA A30": 165,
    "NVIDIA A40": 149.7,
    "NVIDIA A100-SXM4-40GB": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA RTX A5000": 111.1,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    "NVIDIA RTX 6000 Ada Generation": 364.25,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 438.875,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.5,
    "NVIDIA GH200 120GB": 989.5,
    "NVIDIA GH200 144G HBM3e": 989.5,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA B300 SXM6 AC": 2250,
    "NVIDIA GB300": 2500,
    "NVIDIA GeForce RTX 3090": 71,
    "GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5080": 112.6,
    "NVIDIA GeForce RTX 5090": 209.5,
    "AMD Instinct MI210": 181,
    "AMD Instinct MI250X": 191.5,
    "AMD Instinct MI300A": 980.6,
    "AMD Instinct MI300X": 1307.4,
    "AMD Instinct MI300X OAM": 1307.4,
    "AMD Instinct MI325X": 1307.4,
    "AMD Instinct MI355X": 2516.6,
    "AMD Instinct MI355X OAM": 2516.6,
}
# Other names that drivers print, each similar to one in the table.
NEAR_MISSES = [
    "NVIDIA H100",
    "NVIDIA A100-PG509-200",
    "NVIDIA A10M",
    "NVIDIA A16",
    "NVIDIA L20",
    "NVIDIA RTX 5000 Ada Generation",
    "NVIDIA RTX PRO 6000 Blackwell",
    "Quadro RTX 6000",
    "NVIDIA RTX A6000 Laptop GPU",
    "NVIDIA T400 4GB",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 D",
    "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "GRID A100-40C",
    "NVIDIA GeForce RTX 3080 Ti",
    "NVIDIA GeForce RTX 5080 Laptop GPU",
    "AMD Instinct MI300X VF",
    "AMD Instinct MI350X",
    "AMD Radeon Graphics",
    "nvidia h200",
    "NVIDIA H200 ",
    "NVIDIA",
    "",
]
GPU = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)


@pytest.mark.parametrize(("device_name", "tflops"), PRINTED.items(), ids=PRINTED.keys())
def test_a_driver_name_gives_the_dense_peak(device_name: str, tflops: float) -> None:
    gpu = find_gpu(device_name)
    assert gpu is not None
    peaks = gpu.dense_flops_per_s
    assert peaks.get("bfloat16", peaks["float16"]) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("device_name", NEAR_MISSES)
def test_a_similar_name_does_not_get_the_peak_of_another_gpu(device_name: str) -> None:
    assert find_gpu(device_name) is None
    assert device_name in why_unknown(device_name)


def test_every_gpu_of_the_table_is_matched_by_a_driver_name() -> None:
    matched = {gpu.name for name in PRINTED if (gpu := find_gpu(name))}
    assert matched == {gpu.name for gpu in GPUS}
    names = [name for gpu in GPUS for name in gpu.driver_names]
    assert len(set(names)) == len(names), "one name, one GPU"


def test_a_mig_slice_and_an_unknown_name_are_explained() -> None:
    assert "a slice" in why_unknown("NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    assert "no other GPU stands in" in why_unknown("NVIDIA A16")


@pytest.mark.parametrize(
    ("device_name", "reason"),
    [
        ("NVIDIA H20", "publishes no data sheet"),
        ("NVIDIA H20-3e", "publishes no data sheet"),
        ("NVIDIA H800", "publishes no data sheet"),
        ("NVIDIA H800 PCIe", "publishes no data sheet"),
        ("NVIDIA H800 NVL", "publishes no data sheet"),
        ("NVIDIA A800-SXM4-80GB", "publishes no data sheet"),
        ("NVIDIA A800 80GB PCIe", "publishes no data sheet"),
        ("NVIDIA A100-SXM-64GB", "publishes no data sheet"),
        ("NVIDIA GeForce RTX 4090 D", "publishes no data sheet"),
        ("Tesla V100-SXM3-32GB", "the sum over the 16 GPUs of a DGX-2"),
        ("NVIDIA GeForce RTX 3080", "one name of two GPUs"),
        ("AMD Instinct MI250X / MI250", "one name of two GPUs"),
        ("NVIDIA GeForce RTX 4080 SUPER", "only with sparsity"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "only with sparsity"),
        ("NVIDIA GB10", "only with sparsity"),
    ],
)
def test_a_gpu_without_a_published_dense_peak_is_refused_with_the_reason(
    device_name: str, reason: str
) -> None:
    assert device_name.removeprefix("NVIDIA ") in REFUSED
    assert find_gpu(device_name) is None
    assert reason in why_unknown(device_name)


@GPU
def test_a_dtype_with_half_the_bits_has_twice_the_peak(gpu: Gpu) -> None:
    """Mixing peaks with and without sparsity would give a ratio of four."""
    peaks = gpu.dense_flops_per_s
    assert set(peaks) <= set(get_args(Dtype))
    wide_to_narrow = [peaks[dtype] for dtype in ("tf32", "float16", "fp8") if dtype in peaks]
    for wide, narrow in pairwise(wide_to_narrow):
        assert 1.9 * wide < narrow < 2.1 * wide
    assert peaks.get("bfloat16", peaks["float16"]) == peaks["float16"]


@GPU
def test_no_gpu_computes_float32_faster_than_tf32(gpu: Gpu) -> None:
    peaks = gpu.dense_flops_per_s
    assert peaks["float32"] <= peaks.get("tf32", peaks["float16"])


@GPU
def test_every_peak_cites_its_makers_data_sheet(gpu: Gpu) -> None:
    maker = "https://www.amd.com/" if gpu.is_amd else "nvidia.com/"
    assert gpu.source.startswith("https://")
    # NVIDIA's data sheet of the A10G is published by the cloud that it is made for.
    assert maker in gpu.source or gpu.name == "A10G"


@GPU
def test_memory_bandwidth_exceeds_the_link_by_less_than_a_thousand(gpu: Gpu) -> None:
    assert 1 < gpu.memory_bytes_per_s / gpu.link_bytes_per_s < 1000
    assert 300e9 <= gpu.memory_bytes_per_s <= 8e12


def test_a_die_of_an_mi250x_has_half_the_peaks_of_the_card() -> None:
    gpu = find_gpu("AMD Instinct MI250X")
    assert gpu is not None
    assert 2 * gpu.dense_flops_per_s["float16"] == 383e12
    assert "half the card's" in gpu.remark


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
