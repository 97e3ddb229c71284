"""The FLOP convention of each source of published runs, and the FLOPs per token by it.

d width | L layers | T positions | N parameters | E embedding parameters

A row states layers, width, heads and vocabulary size. The feed-forward width and the heads of keys
and values are those of the public model that the row names: a general rule for GPT and MPT, the
published configs for Llama.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from scaling.published.csv_rows import PublishedRow

Convention = Literal["palm", "matmul", "matmul_causal"]
Size = tuple[int, int, int, int]  # layers, width, words, positions


@dataclass(frozen=True, kw_only=True)
class Llama:
    """What the rows leave out of a Llama: gated feed-forward, no biases, untied head."""

    feedforward_width: int
    num_kv_heads: int


# By generation and billions of parameters. Llama 2: Touvron et al. 2023 (arXiv 2307.09288) and
# https://huggingface.co/meta-llama/Llama-2-70b-hf/blob/main/config.json and its sisters; 34B was
# never released, its shape is Code Llama's (arXiv 2308.12950,
# https://huggingface.co/codellama/CodeLlama-34b-hf/blob/main/config.json). Llama 3 and 3.1: table 3
# of Dubey et al. 2024 (arXiv 2407.21783).
LLAMAS = {
    (2, 7): Llama(feedforward_width=11008, num_kv_heads=32),
    (2, 13): Llama(feedforward_width=13824, num_kv_heads=40),
    (2, 34): Llama(feedforward_width=22016, num_kv_heads=8),
    (2, 70): Llama(feedforward_width=28672, num_kv_heads=8),
    (3, 8): Llama(feedforward_width=14336, num_kv_heads=8),
    (3, 70): Llama(feedforward_width=28672, num_kv_heads=8),
    (3, 405): Llama(feedforward_width=53248, num_kv_heads=8),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The parameters of a decoder that the conventions count."""

    matmul_parameters: int  # all matrices and the head, without E
    parameters: int | None  # N from the shape; None if models of this family differ


def shape_of(row: PublishedRow) -> Shape | None:
    """Returns the shape of a row's model; None if the row and the public model leave it open."""
    size = _size(row)
    if size is None:
        return None
    if re.match(r"mpt\b", row.model, re.IGNORECASE):
        return _gpt_shape(size, has_single_form=True)
    if re.match(r"(gpt|turing)", row.model, re.IGNORECASE):
        return _gpt_shape(size, has_single_form=False)
    llama = llama_of(row.model)
    if llama is None or row.num_heads is None:
        return None
    return _llama_shape(size, llama, (row.num_kv_heads or llama.num_kv_heads) / row.num_heads)


def llama_of(model: str) -> Llama | None:
    """Returns the public Llama of a name such as Llama-3.1-8B or "Llama-3-70B, 12 layers"."""
    named = re.match(r"llama[- ]?([0-9])(?:\.[0-9])?[- ]([0-9]+)b\b", model, re.IGNORECASE)
    return LLAMAS.get((int(named[1]), int(named[2]))) if named else None


def _gpt_shape(size: Size, *, has_single_form: bool) -> Shape:
    """A feed-forward of four widths, biases everywhere, learned positions, a tied head: MPT.

    https://github.com/mosaicml/llm-foundry/blob/34c28fc9199278b10193e69fb52979043b7dc1bd/llmfoundry/models/mpt/modeling_mpt.py
    Other models called GPT differ in positions and head, which their rows do not state.
    """
    layers, width, vocabulary, positions = size
    matrices = 12 * width * width
    per_layer = matrices + 13 * width  # biases and norms
    parameters = layers * per_layer + (vocabulary + positions) * width + 2 * width
    return Shape(
        matmul_parameters=layers * matrices + vocabulary * width,
        parameters=parameters if has_single_form else None,
    )


def _llama_shape(size: Size, llama: Llama, kv_share: float) -> Shape:
    layers, width, vocabulary, _ = size
    kv_width = round(width * kv_share)
    matrices = 2 * width * width + 2 * width * kv_width + 3 * width * llama.feedforward_width
    parameters = layers * (matrices + 2 * width) + 2 * vocabulary * width + width
    return Shape(matmul_parameters=layers * matrices + vocabulary * width, parameters=parameters)


def _size(row: PublishedRow) -> Size | None:
    layers, width = row.num_layers, row.width
    vocabulary, positions = row.vocabulary, row.sequence_length
    if layers is None or width is None or vocabulary is None or positions is None:
        return None
    return layers, width, vocabulary, positions


def flops_per_token(row: PublishedRow, convention: Convention) -> float | None:
    """Returns the training FLOPs per token; None if the row states too little.

    `palm` is 6N + 12LdT with every parameter in N; `matmul` replaces N by what is multiplied;
    `matmul_causal` counts half of the attention, T/2 positions per token as NVIDIA does;
    `unitransformer.costs.flops` counts the (T + 1)/2 that a mask leaves. Recomputation is not
    counted.
    """
    size, shape = _size(row), shape_of(row)
    parameters = None
    if convention == "palm" and not row.is_rounded:
        parameters = row.parameters
    if parameters is None and shape is not None:
        parameters = shape.parameters if convention == "palm" else shape.matmul_parameters
    if size is None or parameters is None:
        return None
    layers, width, _, positions = size
    attention = 12.0 * layers * width * positions
    return 6.0 * parameters + (attention / 2 if convention == "matmul_causal" else attention)


@dataclass(frozen=True, kw_only=True)
class Source:
    """How the figures were computed in the rows whose source starts with `name`."""

    name: str
    convention: Convention | None = None  # None: it prints no FLOP/s
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
    Source(name="torchao", evidence="tokens/s and memory only"),
    Source(name="Korthikanti et al. 2022", evidence="iteration times only, as carried by Calculon"),
    Source(name="SimuMax", evidence="iteration times and memory only"),
    Source(name="vTrain", evidence="iteration times only"),
    Source(name="lightning-thunder", evidence="tokens/s and memory only"),
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
