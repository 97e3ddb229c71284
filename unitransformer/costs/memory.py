"""Bytes a rank needs to train a config, by formula: what `--strategy auto` decides by.

Weights, gradients and AdamW's two moments are exact; activations are those that the backward pass
keeps, counted from the layers as they are written; temporary buffers are left to the headroom.
"""

from dataclasses import replace

from unitransformer.config import RunConfig, Strategy
from unitransformer.costs.flops import count_parameters, count_predicted_positions

HEADROOM = 0.1  # share of a device's memory left to buffers, fragments and the runtime


def state_bytes(config: RunConfig) -> int:
    """Weights, gradients and moments of the whole model: 16 bytes a parameter, 8 in bf16-true."""
    size = 2 if config.parallel.precision == "bf16-true" else 4
    return 4 * size * count_parameters(config.model)


def activation_bytes(config: RunConfig) -> int:
    """What the backward pass of one micro-batch finds kept, and the logits and their gradient."""
    size = _activation_size(config)
    # As they are, as probabilities in float32, and the gradient of these.
    logits = _logit_rows(config) * config.model.num_classes * (size + 8)
    return layer_activation_bytes(config) + logits


def layer_activation_bytes(config: RunConfig) -> int:
    """What the layers keep, and the pictures that were cut into patches."""
    model = config.model
    width, wide = model.width, model.feedforward_width
    hidden = wide if model.activation == "relu" else 2 * wide  # GELU keeps what came in as well
    hidden += wide if model.dropout else 0
    # Of every position, and of those that the last layer answers for.
    of_all, of_some = {
        # norm 1, its result, keys and values | queries, attention, norm 2, its result, hidden
        "off": (4 * width, 4 * width + hidden),
        # the input and the results of matrix products
        "selective": (3 * width, 4 * width + wide),
        "full": (width, 0),
    }[config.parallel.activation_checkpointing]
    patch = model.num_channels * model.patch_size**2 if model.patch_size else 0
    rows = config.batch_size * config.sequence_length
    last = config.batch_size * count_predicted_positions(config)
    numbers = rows * (of_all * model.num_layers + patch)
    numbers += (rows * (model.num_layers - 1) + last) * of_some
    return numbers * _activation_size(config)


def _activation_size(config: RunConfig) -> int:
    return 4 if config.parallel.precision == "32-true" else 2


def _logit_rows(config: RunConfig) -> int:
    """Rows of logits that exist at once."""
    rows = config.batch_size * count_predicted_positions(config)
    return min(rows, config.loss_chunk) if config.loss_chunk else rows


def rank_bytes(config: RunConfig) -> int:
    """What one rank needs: its share of the state, and the activations of a micro-batch."""
    parallel = config.parallel
    shares = {"hsdp": parallel.devices, "fsdp": parallel.world_size}
    shares |= {"fsdp1": parallel.world_size, "zero3": parallel.world_size}
    weight = state_bytes(config) // 4
    divided = {"zero1": 2, "zero2": 3}.get(parallel.strategy, 0)  # moments; gradients as well
    if divided:
        state = (4 - divided) * weight + divided * weight // parallel.world_size
    else:
        state = state_bytes(config) // shares.get(parallel.strategy, 1)
    return state + activation_bytes(config)


def choose_strategy(config: RunConfig, memory_bytes: int | None) -> tuple[RunConfig, str]:
    """`config` with a strategy in place of `auto`, and why it is that one.

    `ddp`, which sends least, if all of the model's state fits beside the activations on every
    device; else `hsdp` if a node's share does; else `fsdp`. Where these refuse what else is asked
    for, `fsdp1` takes the place of the last two (16-mixed), and nothing whole that of the first
    (cpu_offload).

    Args:
        memory_bytes: of one device; None if the system does not tell.
    """
    if config.parallel.strategy != "auto":
        return config, "as asked"
    strategy, why = _choose(config, memory_bytes)
    if strategy == "fsdp" and config.parallel.precision == "16-mixed":
        strategy, why = "fsdp1", f"{why}; by fsdp1, as fsdp and hsdp scale no losses for 16-mixed"
    return replace(config, parallel=replace(config.parallel, strategy=strategy)), why


def _choose(config: RunConfig, memory_bytes: int | None) -> tuple[Strategy, str]:
    """By memory; `fsdp` may mean `fsdp1`."""
    parallel = config.parallel
    state, activations = state_bytes(config), activation_bytes(config)
    if parallel.cpu_offload:
        where = f"state {format_gib(state)} waits in host memory, as cpu-offload asks"
        return "fsdp", f"{where}; single and ddp keep it on the device"
    if parallel.world_size == 1:
        return "single", "one device"
    needs = f"state {format_gib(state)} + activations about {format_gib(activations)}"
    if memory_bytes is None:
        return "ddp", f"{needs}; how much a device has is not known"
    has = f"the {format_gib(memory_bytes)} of a device, a tenth left free"
    usable = (1 - HEADROOM) * memory_bytes - activations
    if state <= usable:
        return "ddp", f"{needs} fit in {has}"
    # No hsdp in 16-mixed: all devices divide it, so a node's share says nothing.
    has_hsdp = parallel.num_nodes > 1 and parallel.precision != "16-mixed"
    if has_hsdp and state / parallel.devices <= usable:
        divided = f"divided over a node's {parallel.devices} devices they do"
        return "hsdp", f"{needs} do not fit in {has}; {divided}"
    verdict = "they do" if state / parallel.world_size <= usable else "they may not either"
    divided = f"divided over {parallel.world_size} devices {verdict}"
    return "fsdp", f"{needs} do not fit in {has}; {divided}"


def format_gib(size: float) -> str:
    """As a person reads it: 1.25 GiB."""
    return f"{size / 2**30:.3g} GiB"
