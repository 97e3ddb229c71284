"""Describes the work of one rank in an optimizer step, in seconds at the peaks of its hardware.

T positions | D width | F feed-forward width | V classes | L layers | m positions of a micro-batch

No step reaches the peaks: `scaling.prediction.step_model` turns these seconds into expected ones.
The description holds what any transformer does, so that runs of other suites fit it too.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from scaling.prediction.communication import collectives_of_step
from scaling.prediction.copies import copied_bytes
from scaling.prediction.hardware import Hardware, Link
from unitransformer.config import Precision, RunConfig
from unitransformer.costs.flops import count_parameters, count_predicted_positions
from unitransformer.costs.gpus import MATMUL_DTYPE
from unitransformer.machine.alpha_beta import Collective, ring

# A value of one run, or an array with one value per run.
Value = Any

# Elements that the forward pass of a layer reads and writes outside of matrix products, in units of
# D and F per position: two norms, two residual sums, the heads split and joined; the activation.
ELEMENTS_OF_WIDTH = 14
ELEMENTS_OF_FEEDFORWARD = 2
GATED_ELEMENTS_OF_FEEDFORWARD = 5  # gate, up, their product
# Passes over an array of logits: the product's result, the loss, its gradient, two products of it.
PASSES_OF_LOGITS = 8
# From so many queries on, the backward pass of torch's attention for CPUs takes so many at a time:
# `flash_attention_backward_kernel_impl` of aten/src/ATen/native/cpu.
QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))
# AdamW reads weight, gradient and two moments, and writes all but the gradient, in float32.
BYTES_OF_UPDATE = 28


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Seconds at the peaks of the hardware, of one micro-batch unless a comment says otherwise."""

    parameters: Value  # a count, of the whole model
    ranks: Value  # a count
    layers: Value  # a count
    micro_batches: Value  # a count
    width: Value  # channels
    head_width: Value  # channels
    positions: Value  # of all samples of the micro-batch
    matmul_s: Value  # products of the layers, forward
    attention_s: Value  # products of queries, keys and values, forward, every pair of positions
    scores_s: Value  # attention weights read and written, forward; 0 if the kernel keeps them
    elements_s: Value  # what is read and written between the products of the layers, forward
    head_s: Value  # product of the head, forward
    logits_s: Value  # the loss, forward and backward
    repeated_matmul_s: Value  # what activation checkpointing repeats
    repeated_attention_s: Value
    repeated_scores_s: Value
    repeated_elements_s: Value
    gather_s: Value  # all-gathers of the weights in the forward pass
    regather_s: Value  # the same in the backward pass
    reduce_s: Value  # reductions of the gradients in the backward pass
    update_s: Value  # the optimizer, per step
    publish_s: Value  # gathers of the weights after the optimizer, per step
    copied_s: Value  # weights and gradients copied for collectives, where nothing hides that
    attention_blocks: Value  # a count of small products in 16 bits, where starting one takes long
    doublings: Value  # log2 of the nodes
    is_eight_bits: Value  # 1 if the products are in eight bits
    is_float32: Value  # 1 if they are in float32 or TF32


def gpu_family(hardware: Hardware) -> str:
    """Returns the name of the GPUs that reach the same share of their peak as this one."""
    if hardware.is_cpu:
        return hardware.name
    if hardware.gpu is None:  # a file may have the name of a GPU that is in the fit
        return f"the GPU of {hardware.name}"
    name = hardware.gpu.split()[0].lower()
    return "h100" if name == "h200" else name  # the same chip with more memory


def stack(works: "list[StepWork]", array: Any) -> StepWork:
    """Returns one description whose values are arrays over `works`; `array` makes an array."""
    names = [field.name for field in fields(StepWork)]
    return StepWork(**{name: array([getattr(w, name) for w in works]) for name in names})


def collective_s(
    kind: Collective, size_bytes: float, num_ranks: int, calls: float, hardware: Hardware
) -> float:
    """Returns the seconds of `calls` collectives of `size_bytes` together, over whole nodes.

    Ranks fill one node after another. A ring visits all ranks of a node before the next node, as
    NCCL's does for all-gather and reduce-scatter, so that most of its steps stay within a node. An
    all-reduce adds up within each node first. Each rank of a node has a ring of its own, which
    carries its share of the bytes to the next node. Steps and bytes of a ring are those of
    `unitransformer.machine.alpha_beta`.
    """
    inside = math.gcd(num_ranks, hardware.devices_per_node)
    nodes = num_ranks // inside
    near, far = hardware.collectives.get(kind, hardware.intra_node), hardware.inter_node
    steps, sent = ring(kind, inside)
    far_steps, far_sent = ring(kind, nodes)
    if kind != "all_reduce":
        steps *= nodes
    latency_s = steps * near.latency_s + far_steps * far.latency_s
    bytes_s = size_bytes * (sent / near.bytes_per_s + far_sent / inside / far.bytes_per_s)
    return calls * latency_s + bytes_s


def ring_s(kind: Collective, size_bytes: float, num_ranks: int, calls: float, link: Link) -> float:
    """Returns the seconds of `calls` collectives of `size_bytes` together, over a single ring."""
    steps, sent = ring(kind, num_ranks)
    return calls * steps * link.latency_s + sent * size_bytes / link.bytes_per_s


def matmul_peak(precision: Precision, hardware: Hardware) -> float:
    """Returns the FLOP/s of a device in the number format of the products of a run.

    Raises:
        ValueError: the hardware states no peak for it.
    """
    dtype = MATMUL_DTYPE[precision]
    # torch rounds float32 products to TF32 where a GPU has it, as the recipes ask for.
    if dtype == "float32" and "tf32" in hardware.peak_flops and not hardware.is_cpu:
        return hardware.peak_flops["tf32"]
    if dtype in hardware.peak_flops:
        return hardware.peak_flops[dtype]
    known = ", ".join(hardware.peak_flops)
    raise ValueError(
        f"precision is {precision}, but hardware {hardware.name} has no peak in "
        f"{dtype}, only in {known}; choose another precision or add the peak to its file"
    )


def work_of_config(config: RunConfig, hardware: Hardware) -> StepWork:
    """Returns the work of a run of this suite.

    Raises:
        ValueError: the hardware states no peak for the number format of the products.
    """
    model, parallel = config.model, config.parallel
    peak = matmul_peak(parallel.precision, hardware)
    bytes_per_s = hardware.memory_bytes_per_s
    samples, positions = config.batch_size, config.sequence_length
    width, hidden, layers = model.width, model.feedforward_width, model.num_layers
    predicted = count_predicted_positions(config)
    # Only predicted positions pass through the last layer after its keys and values.
    full = samples * (positions * (layers - 1) + predicted)
    keys = samples * positions * layers
    matmul = 2.0 * keys * 2 * width * width + 2.0 * full * (2 * width * width + 2 * width * hidden)
    attention = 4.0 * full * positions * width
    if model.patch_size is not None:
        matmul += 2.0 * samples * positions * model.num_channels * model.patch_size**2 * width
    element_bytes = 2.0 if parallel.precision == "bf16-true" else 4.0
    if parallel.precision in ("bf16-mixed", "16-mixed"):
        element_bytes = 3.0  # products in 2 bytes, norms and residuals in 4
    passes = ELEMENTS_OF_WIDTH * width + ELEMENTS_OF_FEEDFORWARD * hidden
    elements = full * passes * element_bytes / bytes_per_s
    repeats = parallel.activation_checkpointing
    logits = samples * predicted * config.num_logits
    weights = float(count_parameters(model))
    sharded = parallel.strategy not in ("auto", "single", "ddp")
    # A GPU copies in streams of their own, beside the computation.
    node_size = hardware.devices_per_node
    copied = copied_bytes(config, node_size=node_size) if hardware.is_cpu else 0.0
    return StepWork(
        parameters=weights,
        ranks=parallel.world_size,
        layers=layers,
        micro_batches=config.accumulate,
        width=width,
        head_width=model.head_width,
        positions=samples * positions,
        matmul_s=matmul / peak,
        attention_s=attention / peak,
        scores_s=0.0,
        elements_s=elements,
        head_s=2.0 * samples * predicted * width * config.num_logits / peak,
        logits_s=PASSES_OF_LOGITS * logits * 4.0 / bytes_per_s,
        repeated_matmul_s=matmul / peak if repeats == "full" else 0.0,
        repeated_attention_s=attention / peak if repeats == "full" else 0.0,
        repeated_scores_s=0.0,
        repeated_elements_s=0.0 if repeats == "off" else elements,
        update_s=weights / (parallel.world_size if sharded else 1) * BYTES_OF_UPDATE / bytes_per_s,
        copied_s=copied / bytes_per_s,
        attention_blocks=_attention_blocks(config) if hardware.is_cpu else 0.0,
        doublings=max(0.0, math.log2(parallel.world_size / hardware.devices_per_node)),
        is_eight_bits=0.0,
        is_float32=float(MATMUL_DTYPE[parallel.precision] == "float32"),
        **_communication(config, hardware),
    )


def _communication(config: RunConfig, hardware: Hardware) -> dict[str, float]:
    """Returns the seconds of the collectives, by the field of `StepWork`."""
    times = dict.fromkeys(("gather_s", "regather_s", "reduce_s", "publish_s"), 0.0)
    for sent in collectives_of_step(config, node_size=hardware.devices_per_node):
        if sent.group == "replicate" and not sent.within_node:  # one rank of each node
            seconds = ring_s(
                sent.kind, sent.total_bytes, sent.ranks, sent.calls, hardware.inter_node
            )
        else:
            seconds = collective_s(sent.kind, sent.total_bytes, sent.ranks, sent.calls, hardware)
        if sent.phase == "optimizer":
            times["publish_s"] += seconds
        elif sent.phase == "forward":
            times["gather_s"] += seconds / config.accumulate
        elif sent.kind == "all_gather":
            times["regather_s"] += seconds / config.accumulate
        else:
            times["reduce_s"] += seconds / config.accumulate
    return times


def _attention_blocks(config: RunConfig) -> float:
    """Returns the blocks of queries that attention multiplies in its backward pass in 16 bits.

    oneDNN prepares each of the five products of a block again, which takes longer than the products
    of short sequences. Products in float32 are started at once.
    """
    if config.parallel.precision == "32-true":
        return 0.0

    def blocks(queries: int) -> int:
        size = next(size for least, size in QUERY_BLOCKS if queries >= least)
        return math.ceil(queries / size)

    layers, predicted = config.model.num_layers, count_predicted_positions(config)
    of_layers = (layers - 1) * blocks(config.sequence_length) + blocks(predicted)
    return float(config.batch_size * config.model.num_heads * of_layers)
