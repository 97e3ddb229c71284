"""Describes the work of published runs that only divide the data or the weights over GPUs."""

import functools
import math
import re
from dataclasses import dataclass, replace

from scaling.prediction.fitting import Sample
from scaling.prediction.hardware import Hardware, load_hardware
from scaling.prediction.work import (
    BYTES_OF_UPDATE,
    ELEMENTS_OF_FEEDFORWARD,
    ELEMENTS_OF_WIDTH,
    GATED_ELEMENTS_OF_FEEDFORWARD,
    PASSES_OF_LOGITS,
    StepWork,
    collective_s,
    gpu_family,
    ring_s,
)
from scaling.published.conventions import llama_of
from scaling.published.csv_rows import PublishedRow

# Gradients are reduced, and gathered weights dropped, with each micro-batch.
FULLY_SHARDED = re.compile(r"FSDP FULL_SHARD/\w+|FSDP[12]|FSDP2 zero2|HSDP|FSDP|FSDP\d+ CP1")
KEEPS_WEIGHTS = re.compile(r"FSDP SHARD_GRAD_OP/\w+|FSDP2 zero2")  # not gathered again
# Source: torchtitan, benchmarks of asynchronous tensor parallelism, June 2025.
H100_HBM2E_BYTES_PER_S = 2.4e12
POSITIONS_OVER = re.compile(r"\bCP(\d+)")  # context parallelism
DATA_PARALLEL = re.compile(r"(?:(?:TP1|PP1|CP1) )*DP\d+(?: (?:TP1|PP1|CP1))*")


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A published row, and its step as a sample to fit to."""

    row: PublishedRow
    sample: Sample

    @property
    def is_data_parallel(self) -> bool:
        """Whether every GPU holds all weights."""
        return bool(DATA_PARALLEL.fullmatch(self.row.strategy))


def describe_run(row: PublishedRow) -> PublishedRun | None:
    """Returns a row with its work; None if it lacks a figure or also divides layers or tensors."""
    sharded = re.match(FULLY_SHARDED, row.strategy) or re.match(KEEPS_WEIGHTS, row.strategy)
    is_parallel = DATA_PARALLEL.fullmatch(row.strategy)
    other = re.search(r"\b(TP|PP)([2-9]|\d\d)", row.strategy)
    hardware = _hardware_of(row.gpu)
    batch, tokens_per_s, micro = row.global_batch, row.tokens_per_s, row.micro_batch
    if not (sharded or is_parallel) or other or hardware is None or not (tokens_per_s and micro):
        return None
    if not (
        row.num_layers and row.width and row.num_heads and row.vocabulary and row.sequence_length
    ):
        return None
    over = _positions_over(row)  # so many GPUs share each sample
    samples = (batch or micro * row.num_gpus / over) / row.num_gpus  # of one GPU
    work = _work(row, hardware, samples * over / micro)
    return PublishedRun(
        row=row,
        sample=Sample(
            work=work,
            gpu=gpu_family(hardware),
            software=_software(row),
            source=row.source,
            step_s=samples * row.sequence_length / tokens_per_s,
        ),
    )


@functools.cache
def _hardware_of(gpu: str) -> Hardware | None:
    """Returns the node with GPUs of a printed name; the names of sources leave out details.

    What a name states replaces the figures of the file: the network of a node in Gbit/s, and the
    slower memory of H100 with 96 GB of HBM2e.
    """
    name = gpu.lower().replace("_", " ")
    hardware = _node_of(name)
    if hardware is not None and (network := re.search(r"(\d+)\s?gbps", name)) is not None:
        share = float(network[1]) * 1e9 / 8 / hardware.devices_per_node
        hardware = replace(hardware, inter_node=replace(hardware.inter_node, bytes_per_s=share))
    if hardware is not None and "hbm2e" in name and "h100" in name:
        hardware = replace(hardware, memory_bytes_per_s=H100_HBM2E_BYTES_PER_S)
    return hardware


def _node_of(name: str) -> Hardware | None:
    for pattern, file in (
        ("a100 40", "a100-40-sxm-8"),
        ("a100", "a100-80-sxm-8"),
        ("h100", "h100-sxm-8"),
        ("h200", "h200-sxm-8"),
        ("b200", "b200-8"),
        ("mi300x", "mi300x-8"),
    ):
        if pattern in name and "gb200" not in name:
            return load_hardware(file)
    return None


def _software(row: PublishedRow) -> str:
    if row.source.startswith("vTrain"):
        return "megatron-deepspeed"
    if row.source.startswith("llm-foundry"):
        return "llm-foundry"
    if row.source.startswith("Megatron"):
        return "megatron"
    return "torch compiled" if row.is_compiled else "torch"


def _work(row: PublishedRow, hardware: Hardware, micro_batches: float) -> StepWork:
    sizes = (row.num_layers, row.width, row.num_heads)
    more = (row.vocabulary, row.sequence_length, row.micro_batch)
    # `describe_run` left out rows without one of them.
    layers, width, heads, words, length, micro = (size or 0 for size in sizes + more)
    llama = llama_of(row.model)
    hidden = llama.feedforward_width if llama else 4 * width
    kv_width = width * (row.num_kv_heads or llama.num_kv_heads) // heads if llama else width
    matrices = 2 * width * width + 2 * width * kv_width + (3 if llama else 2) * width * hidden
    # Keys and values of other positions arrive beside the attention, which takes far longer.
    positions, ranks = micro * length // _positions_over(row), row.num_gpus
    peak = hardware.peak_flops["bfloat16"]
    bytes_per_s = hardware.memory_bytes_per_s
    matmul = 2.0 * positions * layers * matrices / peak
    attention = 4.0 * positions * layers * length * width / peak
    gated = GATED_ELEMENTS_OF_FEEDFORWARD if llama else ELEMENTS_OF_FEEDFORWARD
    passes = ELEMENTS_OF_WIDTH * width + gated * hidden
    elements = 2.0 * positions * layers * passes / bytes_per_s
    # Kernels before FlashAttention write and read each weight about eight times in 2 bytes.
    is_unfused = row.source.startswith("vTrain")
    scores = 16.0 * positions * length * heads * layers / bytes_per_s if is_unfused else 0.0
    again = _repeated(row)
    weights = float(layers * matrices + width * words * (2 if llama else 1))
    is_sharded = not DATA_PARALLEL.fullmatch(row.strategy)
    return StepWork(
        parameters=weights,
        ranks=ranks,
        layers=layers,
        micro_batches=micro_batches,
        width=width,
        head_width=width // heads,
        positions=positions,
        matmul_s=matmul,
        attention_s=attention,
        scores_s=scores,
        elements_s=elements,
        head_s=2.0 * positions * width * words / peak,
        logits_s=PASSES_OF_LOGITS * 4.0 * positions * words / bytes_per_s,
        repeated_matmul_s=again[0] * matmul,
        repeated_attention_s=again[1] * attention,
        repeated_scores_s=again[1] * scores,
        repeated_elements_s=again[2] * elements,
        update_s=weights / (ranks if is_sharded else 1) * BYTES_OF_UPDATE / bytes_per_s,
        copied_s=0.0,  # beside the computation
        attention_blocks=0.0,
        doublings=max(0.0, math.log2(ranks / hardware.devices_per_node)),
        is_eight_bits=float(bool(re.search("fp8|float8", row.precision or ""))),
        is_float32=float(bool(re.search("fp32|float32|tf32", row.precision or ""))),
        **_communication(row, weights, micro_batches, hardware),
    )


def _positions_over(row: PublishedRow) -> int:
    over = POSITIONS_OVER.search(row.strategy)
    return int(over[1]) if over else 1


def _repeated(row: PublishedRow) -> tuple[float, float, float]:
    """Returns the shares of matrices, attention and the rest that the backward pass repeats.

    Selective checkpointing of operators in torchtitan keeps every second product and the attention;
    selective checkpointing of layers repeats every second layer.
    """
    kind = row.activation_checkpointing or "none"
    if kind == "full":
        return 1.0, 1.0, 1.0
    if "layer" in kind or "2nd" in kind or (kind == "selective" and "fms" in row.source):
        return 0.5, 0.5, 0.5
    return (0.5, 0.0, 1.0) if kind.startswith("selective") else (0.0, 0.0, 0.0)


def _communication(
    row: PublishedRow, weights: float, micro_batches: float, hardware: Hardware
) -> dict[str, float]:
    ranks, calls = row.num_gpus, (row.num_layers or 0) + 1
    if DATA_PARALLEL.fullmatch(row.strategy):
        reduce = collective_s("all_reduce", 2.0 * weights, ranks, 4, hardware)
        return {
            "gather_s": 0.0,
            "regather_s": 0.0,
            "reduce_s": reduce / micro_batches,  # after the last one
            "publish_s": 0.0,
        }
    is_hybrid = row.strategy.startswith("HSDP")
    group = min(ranks, hardware.devices_per_node) if is_hybrid else ranks
    gather = collective_s("all_gather", 2.0 * weights, group, calls, hardware)
    keeps = re.match(KEEPS_WEIGHTS, row.strategy)
    reduced = 2.0 if "PURE" in row.strategy else 4.0
    reduce = collective_s("reduce_scatter", reduced * weights, group, calls, hardware)
    if is_hybrid:  # shards of the gradients are added up over the nodes
        shard = reduced * weights / group
        reduce += ring_s("all_reduce", shard, ranks // group, calls, hardware.inter_node)
    return {
        "gather_s": gather,
        "regather_s": 0.0 if keeps else gather,
        "reduce_s": reduce,
        "publish_s": 0.0,
    }
