"""Lists the peaks of GPUs from data sheets: FLOP/s by number format, memory and link bandwidth.

A GPU is found by the name its driver prints; no GPU stands in for another. All peaks are dense:
where a data sheet gives only peaks with 2:4 sparsity, the table halves them (`1979 / 2`). Nothing
is guessed: an unknown GPU, a CPU, a mix with fp8 and an ambiguous format have no peak.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Dtype = Literal["float32", "tf32", "float16", "bfloat16", "fp8"]

CPU = "cpu"  # the device name in the record of a run without a GPU

# The format of matrix products by precision, where TF32 does not replace float32.
MATMUL_DTYPE: dict[str, Literal["float32", "float16", "bfloat16"]] = {
    "32-true": "float32",
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
    "16-true": "float16",
}

_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_NVIDIA_FILES = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/"
_GEFORCE = "https://images.nvidia.com/aem-dam/Solutions/geforce/"
_AMD = "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/"
_SHEETS = {
    "volta": "https://images.nvidia.com/content/technologies/volta/pdf/"
    "volta-v100-datasheet-update-us-1165301-r5.pdf",
    "t4": _NVIDIA_FILES + "tesla-t4/t4-tensor-core-datasheet-951643.pdf",
    "a10": _NVIDIA_FILES + "a10/pdf/a10-datasheet.pdf",
    "a10g": "https://d1.awsstatic.com/product-marketing/ec2/"
    "NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
    "a30": "https://www.nvidia.com/content/dam/en-zz/Solutions/data-center/products/a30-gpu/pdf/"
    "a30-datasheet.pdf",
    "a40": "https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf",
    "a5000": "https://www.nvidia.com/content/dam/en-zz/Solutions/products/workstations/"
    "nvidia-rtx-a5000-datasheet.pdf",
    "a100": _NVIDIA_FILES + "a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    "ampere": "https://www.nvidia.com/content/PDF/"
    "nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf",
    "l4": _NVIDIA + "l4/",
    "l40": _NVIDIA + "l40/",
    "l40s": _NVIDIA + "l40s/",
    "h100": _NVIDIA + "h100/",
    "hopper": "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper",
    "h200": _NVIDIA + "h200/",
    "gh200": "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip",
    "hgx": _NVIDIA + "hgx/",
    "gb200": _NVIDIA + "gb200-nvl72/",
    "gb300": _NVIDIA + "gb300-nvl72/",
    "ada": _GEFORCE + "ada/nvidia-ada-gpu-architecture.pdf",
    "rtx50": _GEFORCE + "blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    "ada6k": "https://www.nvidia.com/en-us/products/workstations/rtx-6000/",
    "pro6k": "https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/"
    "quadro-product-literature/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf",
    "mi210": "https://www.amd.com/content/dam/amd/en/documents/instinct-business-docs/"
    "product-briefs/instinct-mi210-brochure.pdf",
    "mi200": _AMD + "instinct-mi200-datasheet.pdf",
    "mi300a": _AMD + "data-sheets/amd-instinct-mi300a-data-sheet.pdf",
    "mi300x": _AMD + "data-sheets/amd-instinct-mi300x-data-sheet.pdf",
    "mi325x": "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html",
    "mi355x": _AMD + "product-briefs/amd-instinct-mi355x-gpu-brochure.pdf",
}

_NO = None  # the GPU has no matrix units for the format
_PCI, _NVL, _C2C, _INF = "PCIe", "NVLink", "NVLink-C2C", "Infinity Fabric"
# Dense TFLOP/s by format, GB/s of memory, GB/s of the link in both directions together.
# fmt: off
_TABLE: dict[str, tuple[float, float | None, float, float | None, float | None,
                        float, str, float, str]] = {
    #                float32   tf32      float16   bfloat16  fp8       mem.  link        sheet
    "V100 SXM2":     (15.7,     _NO,      125,      _NO,      _NO,      900,  _NVL, 300,  "volta"),
    "V100 PCIe":     (14,       _NO,      112,      _NO,      _NO,      900,  _PCI, 32,   "volta"),
    "V100S PCIe":    (16.4,     _NO,      130,      _NO,      _NO,      1134, _PCI, 32,   "volta"),
    "T4":            (8.1,      _NO,      65,       _NO,      _NO,      320,  _PCI, 32,   "t4"),
    "A10":           (31.2,     62.5,     125,      125,      _NO,      600,  _PCI, 64,   "a10"),
    "A10G":          (35,       35,       70,       70,       _NO,      600,  _PCI, 64,   "a10g"),
    "A30":           (10.3,     82,       165,      165,      _NO,      933,  _PCI, 64,   "a30"),
    "A40":           (37.4,     74.8,     149.7,    149.7,    _NO,      696,  _PCI, 64,   "a40"),
    "A100 40GB SXM": (19.5,     156,      312,      312,      _NO,      1555, _NVL, 600,  "a100"),
    "A100 80GB SXM": (19.5,     156,      312,      312,      _NO,      2039, _NVL, 600,  "a100"),
    "A100 40GB PCIe":(19.5,     156,      312,      312,      _NO,      1555, _PCI, 64,   "a100"),
    "A100 80GB PCIe":(19.5,     156,      312,      312,      _NO,      1935, _PCI, 64,   "a100"),
    "A5000":         (27.8,     222.2 / 4, 222.2 / 2, 222.2 / 2, _NO,   768,  _PCI, 64,   "a5000"),
    "A6000":         (38.7,     77.4,     154.8,    154.8,    _NO,      768,  _PCI, 64,   "ampere"),
    "L4":            (30.3,     120 / 2,  242 / 2,  242 / 2,  485 / 2,  300,  _PCI, 64,   "l4"),
    "L40":           (90.5,     90.5,     181.05,   181.05,   362,      864,  _PCI, 64,   "l40"),
    "RTX 6000 Ada":  (91.1,     1457 / 8, 1457 / 4, 1457 / 4, 1457 / 2, 960,  _PCI, 64,   "ada6k"),
    "L40S":          (91.6,     183,      362.05,   362.05,   733,      864,  _PCI, 64,   "l40s"),
    "H100 SXM":      (67,       989 / 2,  1979 / 2, 1979 / 2, 3958 / 2, 3350, _NVL, 900,  "h100"),
    "H100 PCIe":     (51.2,     378,      756,      756,      1513,     2000, _PCI, 128,  "hopper"),
    "H100 NVL":      (60,       835 / 2,  1671 / 2, 1671 / 2, 3341 / 2, 3900, _NVL, 600,  "h100"),
    "H200":          (67,       989 / 2,  1979 / 2, 1979 / 2, 3958 / 2, 4800, _NVL, 900,  "h200"),
    "H200 NVL":      (60,       835 / 2,  1671 / 2, 1671 / 2, 3341 / 2, 4800, _NVL, 900,  "h200"),
    "GH200 96GB":    (67,       989 / 2,  1979 / 2, 1979 / 2, 3958 / 2, 4000, _C2C, 900,  "gh200"),
    "GH200 144GB":   (67,       989 / 2,  1979 / 2, 1979 / 2, 3958 / 2, 4900, _C2C, 900,  "gh200"),
    "B200":          (75,       2250 / 2, 4500 / 2, 4500 / 2, 9000 / 2, 8000, _NVL, 1800, "hgx"),
    "GB200":         (80,       2500 / 2, 5000 / 2, 5000 / 2, 10e3 / 2, 8000, _NVL, 1800, "gb200"),
    "B300":          (75,       2250 / 2, 4500 / 2, 4500 / 2, 9000 / 2, 8000, _NVL, 1800, "hgx"),
    "GB300":         (80,       2500 / 2, 5000 / 2, 5000 / 2, 10e3 / 2, 8000, _NVL, 1800, "gb300"),
    "RTX 3090":      (35.6,     35.6,     71,       71,       _NO,      936,  _PCI, 64,   "ampere"),
    "RTX 4090":      (82.6,     82.6,     165.2,    165.2,    330.3,    1008, _PCI, 64,   "ada"),
    "RTX PRO 6000":  (125,      251.9,    503.8,    503.8,    1007.6,   1792, _PCI, 128,  "pro6k"),
    "RTX PRO 6000 Max-Q":
                     (110,      3511 / 16, 3511 / 8, 3511 / 8, 3511 / 4, 1792, _PCI, 128, "pro6k"),
    "RTX 5080":      (56.3,     56.3,     112.6,    112.6,    225.1,    960,  _PCI, 128,  "rtx50"),
    "RTX 5090":      (104.8,    104.8,    209.5,    209.5,    419,      1792, _PCI, 128,  "rtx50"),
    "MI210":         (45.3,     _NO,      181,      181,      _NO,      1600, _PCI, 64,   "mi210"),
    "MI250X":        (95.7 / 2, _NO,      383 / 2,  383 / 2,  _NO,      1600, _INF, 400,  "mi200"),
    "MI300A":        (122.6,    490.3,    980.6,    980.6,    1961.2,   5300, _INF, 1024, "mi300a"),
    "MI300X":        (163.4,    653.7,    1307.4,   1307.4,   2614.9,   5300, _INF, 896,  "mi300x"),
    "MI325X":        (163.4,    653.7,    1307.4,   1307.4,   2614.9,   6000, _INF, 896,  "mi325x"),
    "MI355X":        (157.3,    _NO,      2516.6,   2516.6,   5033.2,   8000, _INF, 1075, "mi355x"),
}
# fmt: on

# Names that drivers print, without "NVIDIA ", where they are not the name in the table.
_DRIVER_NAMES = {
    "V100 SXM2": ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
    "V100 PCIe": ("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"),
    "V100S PCIe": ("Tesla V100S-PCIE-32GB",),
    "T4": ("Tesla T4", "T4"),
    "A100 40GB SXM": ("A100-SXM4-40GB",),
    "A100 80GB SXM": ("A100-SXM4-80GB",),
    "A100 40GB PCIe": ("A100-PCIE-40GB",),
    "A5000": ("RTX A5000",),
    "A6000": ("RTX A6000",),
    "RTX 6000 Ada": ("RTX 6000 Ada Generation",),
    "RTX PRO 6000": ("RTX PRO 6000 Blackwell Workstation Edition",),
    "RTX PRO 6000 Max-Q": ("RTX PRO 6000 Blackwell Max-Q Workstation Edition",),
    "H100 SXM": ("H100 80GB HBM3",),
    "GH200 96GB": ("GH200 480GB", "GH200 120GB"),  # sizes of the CPU's memory
    "GH200 144GB": ("GH200 144G HBM3e",),
    "B300": ("B300 SXM6 AC",),
    "RTX 3090": ("GeForce RTX 3090",),
    "RTX 4090": ("GeForce RTX 4090",),
    "RTX 5080": ("GeForce RTX 5080",),
    "RTX 5090": ("GeForce RTX 5090",),
    "MI210": ("AMD Instinct MI210",),
    "MI250X": ("AMD Instinct MI250X",),
    "MI300A": ("AMD Instinct MI300A",),
    "MI300X": ("AMD Instinct MI300X", "AMD Instinct MI300X OAM"),
    "MI325X": ("AMD Instinct MI325X", "AMD Instinct MI325X OAM"),
    "MI355X": ("AMD Instinct MI355X", "AMD Instinct MI355X OAM"),
}

_GEFORCE_RATE = (
    "GeForce halves the advertised rate when it adds float16 products in float32, as torch"
)
_HGX = "an eighth of the board's value"
_NVL72 = "a 72nd of the rack's value"
_BRIDGE = "a bridge joins two of them by NVLink at {} GB/s"
_TO_CPU = "the link leads to its CPU; the link between GPUs depends on the system"
_REMARKS = {
    "T4": "the data sheet rounds memory to 300 GB/s; 5001 MHz x 2 x 32 bytes are 320",
    "A10G": "made for one cloud; its matrix units are slower than those of the A10",
    "A30": _BRIDGE.format(200),
    "A40": _BRIDGE.format(112.5),
    "A100 40GB PCIe": _BRIDGE.format(600) + "; 250 W hold its clock below the SXM's",
    "A100 80GB PCIe": _BRIDGE.format(600) + "; 300 W hold its clock below the SXM's",
    "A5000": "the data sheet prints 222.2 in float16 with sparsity; " + _BRIDGE.format(112.5),
    "A6000": "the data sheet prints 309.7 with sparsity; " + _BRIDGE.format(112.5),
    "RTX 6000 Ada": "the data sheet prints 1457.0 in fp8 with sparsity",
    "L40S": "the data sheet prints 733 with sparsity, which is not quite twice this; its 142 units "
    "at 2520 MHz do 366.4",
    "H100 PCIe": _BRIDGE.format(600) + "; fewer units and a lower clock than the SXM",
    "H100 NVL": "one card; early sheets print the pair. NVLink joins two",
    "H200 NVL": "NVLink joins two or four by a bridge",
    "GH200 96GB": _TO_CPU,
    "GH200 144GB": _TO_CPU,
    "B200": _HGX,
    "GB200": _NVL72,
    "B300": _HGX + "; its novelty is FP4, not these formats",
    "GB300": _NVL72,
    "RTX 3090": _GEFORCE_RATE + "; " + _BRIDGE.format(112.5),
    "RTX 4090": _GEFORCE_RATE,
    "RTX PRO 6000": "the data sheet rounds to 4000 in fp4 with sparsity, eight times float16",
    "RTX PRO 6000 Max-Q": "the data sheet prints 3511 in fp4 with sparsity, eight times float16",
    "RTX 5080": _GEFORCE_RATE,
    "RTX 5090": _GEFORCE_RATE + "; it may clock above the 2407 MHz its peaks are given for",
    "MI210": "float32 is that of matrix units; bridges join two or four at up to 300 GB/s",
    "MI250X": "torch sees each of its two dies as a device: all values are half the card's; "
    "float32 is that of matrix units",
    "MI300A": "of the whole chip, which has CPU cores too; eight links of 128 GB/s, some for PCIe",
    "MI300X": "of the whole card, not of a partition (CPX, DPX)",
    "MI325X": "of the whole card, not of a partition (CPX, DPX)",
    "MI355X": "of the whole card, not of a partition; TF32 is emulated",
}

# Left out on purpose, by the name that the driver prints without "NVIDIA ".
_NO_SHEET = "its maker publishes no data sheet outside of one country or customer"
_SPARSE = "its data sheet gives tensor peaks only with sparsity"
_TWO_GPUS = "it is one name of two GPUs with different peaks"
REFUSED = {
    **dict.fromkeys(("H20", "H20-3e", "H800", "H800 PCIe", "H800 NVL"), _NO_SHEET),
    **dict.fromkeys(("A800-SXM4-80GB", "A800 80GB PCIe", "A100-SXM-64GB"), _NO_SHEET),
    "GeForce RTX 4090 D": _NO_SHEET,
    "Tesla V100-SXM3-32GB": "its maker publishes only the sum over the 16 GPUs of a DGX-2",
    "GeForce RTX 3080": _TWO_GPUS,  # with 10 and with 12 GB
    "AMD Instinct MI250X / MI250": _TWO_GPUS,
    "GeForce RTX 4080 SUPER": _SPARSE,
    "RTX PRO 6000 Blackwell Server Edition": _SPARSE + ", rounded to whole PFLOP/s",
    "GB10": _SPARSE,
}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as torch sees it, by its data sheet."""

    name: str
    driver_names: tuple[str, ...]  # without a leading "NVIDIA "
    dense_flops_per_s: Mapping[Dtype, float]  # only formats that it has
    memory_bytes_per_s: float
    link: str
    link_bytes_per_s: float  # both directions together, as data sheets count; a ring has half
    source: str
    remark: str  # caveat of these values

    @property
    def is_amd(self) -> bool:
        return self.driver_names[0].startswith("AMD ")


def _build(name: str) -> Gpu:
    float32, tf32, float16, bfloat16, fp8, memory, link, link_speed, sheet = _TABLE[name]
    peaks = zip(get_args(Dtype), (float32, tf32, float16, bfloat16, fp8), strict=True)
    return Gpu(
        name=name,
        driver_names=_DRIVER_NAMES.get(name, (name,)),
        dense_flops_per_s={dtype: peak * 1e12 for dtype, peak in peaks if peak},
        memory_bytes_per_s=memory * 1e9,
        link=link,
        link_bytes_per_s=link_speed * 1e9,
        source=_SHEETS[sheet],
        remark=_REMARKS.get(name, ""),
    )


GPUS = tuple(_build(name) for name in _TABLE)
_BY_DRIVER_NAME = {driver_name: gpu for gpu in GPUS for driver_name in gpu.driver_names}


def find_gpu(device_name: str) -> Gpu | None:
    """Returns the GPU whose driver prints exactly `device_name`; None if it is not in the table."""
    return _BY_DRIVER_NAME.get(device_name.removeprefix("NVIDIA "))


def why_unknown(device_name: str) -> str:
    """Returns why `find_gpu` finds no GPU."""
    if " MIG " in device_name:
        return f"{device_name} is a slice of a GPU, whose share of the peak is not published"
    why = REFUSED.get(device_name.removeprefix("NVIDIA "), "no other GPU stands in for it")
    return f"{device_name} is not in the table of dense peaks: {why}"


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
