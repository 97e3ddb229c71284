"""Predicts the seconds of an optimizer step from its work at the peaks of the hardware.

Products reach a share of the peak that grows with the width and with the size of a head. What lies
between the products is bound by the bandwidth of the memory, and small layers by the time in which
the host starts their kernels. Collectives run beside the computation of the next layer: what they
take longer than that is exposed, and what is hidden still slows the computation down.
"""

from dataclasses import dataclass

from scaling.prediction.work import StepWork, Value

# How sharply the longer of two times that overlap counts: (a^p + b^p)^(1/p).
SHARPNESS = 6.0


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """How far software and a GPU stay from the peaks. Shares are in (0, 1]."""

    matmul_share: Value = 0.80  # of the peak, for very wide products
    attention_share: Value = 0.60  # of the peak, for very wide heads
    half_width: Value = 100.0  # channels at which products reach half of their share
    half_head: Value = 16.0  # channels of a head at which attention reaches half of its share
    half_positions: Value = 100.0  # positions of a micro-batch, likewise
    matmul_backward: Value = 1.1  # seconds of the backward pass per FLOP, over those of the forward
    attention_backward: Value = 1.7
    element_passes: Value = 1.3  # bytes that move over those of `StepWork.elements_s`
    element_backward: Value = 1.7
    logits_passes: Value = 1.2
    score_passes: Value = 1.0
    eight_bits_speed: Value = 1.45  # of products in eight bits over those in sixteen
    layer_s: Value = 1e-3  # in which the host starts the kernels of a layer, forward and backward
    start_s: Value = 2e-3  # likewise, of the rest of a micro-batch
    host_sharpness: Value = 2.5  # of the longer of both: layers mix short kernels with long ones
    block_s: Value = 1e-4  # in which a CPU starts the products of a block of `attention_blocks`
    copy_passes: Value = 1.0  # bytes that move over those of `StepWork.copied_s`
    update_passes: Value = 1.5
    step_s: Value = 3e-3  # of a step, whatever its size
    link_share: Value = 0.75  # of the bandwidth of links
    contention: Value = 0.3  # slow-down of computation by a hidden collective, as a share of it
    straggling: Value = 0.01  # share of a step lost each time that the nodes double
    site: Value = 1.0  # factor of all but the optimizer: clocks, cooling, versions


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The seconds of a step by what they are spent on; they add up to `total_s`."""

    products_s: Value  # matrix products and attention
    memory_s: Value  # what the bandwidth of the memory limits
    host_s: Value  # in which the device waits for the host to start kernels
    exposed_communication_s: Value
    optimizer_s: Value
    hidden_communication_s: Value  # beside the computation: not part of the total

    @property
    def compute_s(self) -> Value:
        """Forward and backward pass without communication."""
        return self.products_s + self.memory_s + self.host_s

    @property
    def total_s(self) -> Value:
        return self.compute_s + self.exposed_communication_s + self.optimizer_s


def step_parts(work: StepWork, c: Coefficients) -> Parts:
    """Returns the expected seconds of a step; arrays in, arrays out."""
    share = c.matmul_share / (1 + c.half_width / work.width + c.half_positions / work.positions)
    speed = share * (1 + work.is_eight_bits * (c.eight_bits_speed - 1))
    attention_share = c.attention_share / (1 + c.half_head / work.head_width)
    matmul, attention = work.matmul_s / speed, work.attention_s / attention_share
    moved = work.scores_s * c.score_passes + work.elements_s * c.element_passes
    products_forward = matmul + attention
    products_backward = (
        2 * (matmul * c.matmul_backward + attention * c.attention_backward)
        + work.repeated_matmul_s / speed
        + work.repeated_attention_s / attention_share
        + work.attention_blocks * c.block_s
    )
    moved_backward = (
        moved * c.element_backward
        + work.repeated_scores_s * c.score_passes
        + work.repeated_elements_s * c.element_passes
    )
    head = work.head_s / share * (1 + 2 * c.matmul_backward)
    logits = work.logits_s * c.logits_passes
    forward = products_forward + moved
    copies = work.copied_s * c.copy_passes
    backward = products_backward + moved_backward + head + logits + copies
    device = forward + backward
    host = _excess(work.layers * c.layer_s + c.start_s, device, c.host_sharpness)
    exposed, hidden = _communication(work, c, forward, backward)
    exposed = exposed + c.straggling * work.doublings * (device + host)
    count = work.micro_batches * c.site
    return Parts(
        products_s=(products_forward + products_backward + head) * count,
        memory_s=(moved + moved_backward + logits + copies) * count,
        host_s=host * count,
        exposed_communication_s=exposed * count,
        optimizer_s=work.update_s * c.update_passes + c.step_s,
        hidden_communication_s=hidden * count,
    )


def _communication(
    work: StepWork, c: Coefficients, forward: Value, backward: Value
) -> tuple[Value, Value]:
    """Returns the exposed and the hidden seconds of the collectives of a micro-batch.

    The collective of a layer runs beside the computation of the one before it, so the first gather
    and the last reduction have nothing to hide behind.
    """
    gather, regather, reduce, publish = (
        seconds / c.link_share
        for seconds in (
            work.gather_s,
            work.regather_s,
            work.reduce_s,
            work.publish_s / work.micro_batches,
        )
    )
    alone = 1 / (work.layers + 1)
    beside_forward, beside_backward = gather * (1 - alone), regather + reduce * (1 - alone)
    over = _excess(beside_forward, forward) + _excess(beside_backward, backward)
    hidden = beside_forward + beside_backward - over
    return alone * (gather + reduce) + publish + over + c.contention * hidden, hidden


def _excess(seconds: Value, behind: Value, sharpness: Value = SHARPNESS) -> Value:
    """Returns what of `seconds` does not fit behind others; smooth, so that it can be fitted."""
    return behind * ((1 + (seconds / behind) ** sharpness) ** (1 / sharpness) - 1)
