"""The FLOP convention, printed digits and peak rates of each source of published runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from scaling.published.csv_rows import PublishedRow
from scaling.published.shapes import Convention


@dataclass(frozen=True, kw_only=True)
class Source:
    """How the figures were computed in the rows whose source starts with `name`."""

    name: str
    convention: Convention | None  # None: it prints no FLOP/s
    evidence: str  # where the convention is written down
    mfu_digits: int = 3  # decimals of the share
    flops_digits: int = 0  # decimals of the TFLOP/s
    cuts_flops: bool = False  # TFLOP/s are cut to whole ones, not rounded
    # Dense FLOP/s by GPU name; keys with "fp8" are for rows in eight bits.
    peaks: Mapping[str, float] = field(default_factory=dict)


# The first match counts, so special names come before general ones.
SOURCES = (
    Source(
        name="llm-foundry",
        convention="palm",
        evidence="https://github.com/mosaicml/llm-foundry/blob/061f2c7ce64e655100286584a7629e2a09f827ba/scripts/train/benchmarking/collect_results.py",
        mfu_digits=4,
        cuts_flops=True,
        # Composer's GPU_AVAILABLE_FLOPS, which that script divides by.
        peaks={"h100": 989.4e12, "h100 fp8": 1978.9e12, "a100": 312e12},
    ),
    # The code leaves E out since April 2024, but these rows reproduce only with E.
    Source(
        name="torchtitan 2024-08",
        convention="palm",
        evidence="https://github.com/pytorch/torchtitan/blob/3faaa1a0d/docs/performance.md",
        peaks={"a100": 312e12},
    ),
    Source(
        name="torchtitan",
        convention="matmul",
        evidence="https://github.com/pytorch/torchtitan/blob/76dd118bd11ff2e52550378f8d3bc74917a8d38d/torchtitan/models/utils.py",
        peaks={"a100": 312e12, "h100": 989e12, "h200": 989e12},
    ),
    Source(
        name="fms-fsdp",
        convention="palm",
        evidence="https://github.com/foundation-model-stack/fms-fsdp/blob/5a296afe42f9932f590783cb053fa0f9384e01fc/README.md",
        mfu_digits=2,
        peaks={"a100": 312e12, "h100": 989e12},
    ),
    # Logits counted, attention in full: 24.07 is older than the halving.
    Source(
        name="NeMo 24.07",
        convention="matmul",
        evidence="https://github.com/NVIDIA/NeMo/blob/034b17b3620b11a0f958989ebe52cd6791e4aa89/nemo/utils/flops_formulas.py",
    ),
    Source(
        name="Megatron-Bridge",
        convention="matmul_causal",
        evidence="https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/0494433be0f526f59f7ad56bec005279af32c375/src/megatron/bridge/training/utils/flop_utils.py",
    ),
    Source(
        name="Megatron-Core",
        convention="matmul_causal",
        evidence="https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64ddf34856e74b24714e3bedb2f5a39553/megatron/training/training.py",
        mfu_digits=2,
        flops_digits=1,
        peaks={"h100": 989e12},
    ),
    Source(name="torchao", convention=None, evidence="tokens/s and memory only"),
    Source(
        name="Korthikanti et al. 2022",
        convention=None,
        evidence="iteration times only, as carried by Calculon",
    ),
    Source(name="SimuMax", convention=None, evidence="iteration times and memory only"),
    Source(name="vTrain", convention=None, evidence="iteration times only"),
    Source(name="lightning-thunder", convention=None, evidence="tokens/s and memory only"),
)


def source_of(row: PublishedRow) -> Source | None:
    """Returns the source of a row; None if it is not in `SOURCES`."""
    return next((source for source in SOURCES if row.source.startswith(source.name)), None)


def peak_of(row: PublishedRow, source: Source) -> float | None:
    """Returns the dense peak that the source divides by, FLOP/s per GPU; None if it names none."""
    is_eight_bits = "fp8" in (row.precision or "") or "float8" in (row.precision or "")
    for name, peak in source.peaks.items():
        gpu, _, bits = name.partition(" ")
        if gpu in row.gpu.lower() and bool(bits) == is_eight_bits:
            return peak
    return None
