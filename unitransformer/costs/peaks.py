"""Finds which dense peak applies to a GPU and a precision.

Nothing is guessed: an unknown GPU, a CPU, a mix with fp8 and an ambiguous format have no peak.
"""

from dataclasses import dataclass
from typing import Literal

from unitransformer.costs.gpus import Dtype, Gpu, find_gpu, why_unknown

CPU = "cpu"  # the device name in the record of a run without a GPU

# The format of matrix products by precision, where TF32 does not replace float32.
MATMUL_DTYPE: dict[str, Literal["float32", "float16", "bfloat16"]] = {
    "32-true": "float32",
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
    "16-true": "float16",
}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The dense peak of one device, or the reason why there is none."""

    dtype: Dtype | None  # format of matrix products; None: ambiguous
    flops_per_s: float | None = None
    source: str | None = None  # data sheet
    remark: str = ""  # caveat of the value
    reason: str | None = None  # why there is no value


def find_peak(device_name: str, precision: str, *, allows_tf32: bool | None = None) -> Peak:
    """Returns the dense peak of one device for the matrix products of a run.

    Args:
        device_name: as the driver prints it, or "cpu".
        precision: Lightning's name, such as "bf16-mixed".
        allows_tf32: whether torch may compute float32 products in TF32: its
            `get_float32_matmul_precision()` is not "highest". None: unknown.
    """
    gpu = None if device_name == CPU else find_gpu(device_name)
    dtype, ambiguity = _find_dtype(device_name, gpu, precision, allows_tf32)
    if device_name == CPU:
        no_peak = "a CPU has no published peak; compare with its measured ceiling"
        return Peak(dtype=dtype, reason=ambiguity or no_peak)
    if gpu is None:
        return Peak(dtype=dtype, reason=why_unknown(device_name))
    if dtype is None:
        return Peak(dtype=dtype, reason=ambiguity)
    if dtype not in gpu.dense_flops_per_s:
        return Peak(dtype=dtype, reason=f"{gpu.name} has no published dense peak in {dtype}")
    return Peak(
        dtype=dtype,
        flops_per_s=gpu.dense_flops_per_s[dtype],
        source=gpu.source,
        remark=gpu.remark,
    )


def _find_dtype(
    device_name: str, gpu: Gpu | None, precision: str, allows_tf32: bool | None
) -> tuple[Dtype | None, str]:
    """Returns the format of matrix products, or why it is ambiguous."""
    if precision.startswith("transformer-engine") or "fp8" in precision:
        return None, f"precision {precision} mixes fp8 with wider formats, which have other peaks"
    if precision not in MATMUL_DTYPE:
        return None, f"precision {precision} does not say what matrix products are computed in"
    dtype: Dtype = MATMUL_DTYPE[precision]
    if dtype != "float32" or device_name == CPU or allows_tf32 is False:
        return dtype, ""
    if gpu is not None and not gpu.is_amd and "tf32" not in gpu.dense_flops_per_s:
        return "float32", ""  # older than TF32: the switch has no effect
    if allows_tf32 is None:
        return None, "precision 32-true, and it is not known whether TF32 replaced float32"
    if gpu is not None and gpu.is_amd:
        return None, "precision 32-true with TF32 allowed: ROCm's own switches decide if it is used"
    return "tf32", ""
