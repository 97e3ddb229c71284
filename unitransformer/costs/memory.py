"""Computes the memory that a rank needs to train a config, and chooses a strategy by it.

Weights, gradients and AdamW's two moments are exact. Activations are those that the layers save for
the backward pass. Temporary buffers belong to the headroom.
"""

from dataclasses import replace

from unitransformer.config import RunConfig, Strategy
from unitransformer.costs.flops import count_parameters, count_predicted_positions

HEADROOM = 0.1  # share of a device's memory for buffers, fragmentation and the runtime


def state_bytes(config: RunConfig) -> int:
    """Returns the bytes of weights, gradients and moments: 16 per parameter, 8 in bf16-true."""
    size = 2 if config.parallel.precision == "bf16-true" else 4
    return 4 * size * count_parameters(config.model)


def activation_bytes(config: RunConfig) -> int:
    """Returns what a micro-batch saves for the backward pass, with logits and their gradient."""
    rows = config.batch_size * count_predicted_positions(config)
    rows = min(rows, config.loss_chunk) if config.loss_chunk else rows
    # The logits, their probabilities in float32, and the gradient of these.
    size = _activation_size(config) + 8
    return layer_activation_bytes(config) + rows * config.model.num_classes * size


def layer_activation_bytes(config: RunConfig) -> int:
    """Returns what the layers save for the backward pass, and the patches of images."""
    model = config.model
    width, feedforward = model.width, model.feedforward_width
    hidden = feedforward if model.activation == "relu" else 2 * feedforward  # GELU saves its input
    hidden += feedforward if model.dropout else 0
    # Numbers per position of the input, and per position that the layer computes.
    per_input, per_output = {
        # norm 1, its result, keys and values | queries, attention, norm 2, its result, hidden
        "off": (4 * width, 4 * width + hidden),
        # the input and the results of matrix products
        "selective": (3 * width, 4 * width + feedforward),
        "full": (width, 0),
    }[config.parallel.activation_checkpointing]
    patch = model.num_channels * model.patch_size**2 if model.patch_size else 0
    rows = config.batch_size * config.sequence_length
    last = config.batch_size * count_predicted_positions(config)
    numbers = rows * (per_input * model.num_layers + patch)
    numbers += (rows * (model.num_layers - 1) + last) * per_output
    return numbers * _activation_size(config)


def _activation_size(config: RunConfig) -> int:
    return 4 if config.parallel.precision == "32-true" else 2


def rank_bytes(config: RunConfig) -> int:
    """Returns what one rank needs: its share of the state, and its activations."""
    parallel = config.parallel
    state = state_bytes(config)
    quarter = state // 4  # weights, gradients and two moments are of one size
    match parallel.strategy:
        case "hsdp":
            state //= parallel.devices
        case "fsdp" | "fsdp1" | "zero3":
            state //= parallel.world_size
        case "zero2":
            state = quarter + 3 * quarter // parallel.world_size
        case "zero1":
            state = 2 * quarter + 2 * quarter // parallel.world_size
    return state + activation_bytes(config)


def choose_strategy(config: RunConfig, memory_bytes: int | None) -> tuple[RunConfig, str]:
    """Returns `config` with a strategy in place of `auto`, and the reason.

    The choice is `ddp`, which communicates least, if the whole state and the activations fit on
    every device; else `hsdp` if a node's share fits; else `fsdp`. `fsdp1` replaces the last two for
    16-mixed. cpu_offload needs a sharded strategy. `memory_bytes` is that of one device.
    """
    if config.parallel.strategy != "auto":
        return config, "as configured"
    strategy, reason = _choose(config, memory_bytes)
    if strategy == "fsdp" and config.parallel.precision == "16-mixed":
        strategy = "fsdp1"
        reason += "; fsdp1, as fsdp and hsdp do not scale losses for 16-mixed"
    return replace(config, parallel=replace(config.parallel, strategy=strategy)), reason


def _choose(config: RunConfig, memory_bytes: int | None) -> tuple[Strategy, str]:
    """Returns the strategy and the reason; `fsdp` may mean `fsdp1`."""
    parallel = config.parallel
    state, activations = state_bytes(config), activation_bytes(config)
    if parallel.cpu_offload:
        reason = f"cpu-offload keeps the state of {format_gib(state)} in host memory"
        return "fsdp", f"{reason}; single and ddp keep it on the device"
    if parallel.world_size == 1:
        return "single", "one device"
    needs = f"state {format_gib(state)} + activations about {format_gib(activations)}"
    if memory_bytes is None:
        return "ddp", f"{needs}; the memory of a device is unknown"
    has = f"the {format_gib(memory_bytes)} per device, with a tenth left free"
    usable = (1 - HEADROOM) * memory_bytes - activations
    if state <= usable:
        return "ddp", f"{needs} fit in {has}"
    # fsdp1 shards 16-mixed over all devices, so a node's share does not matter.
    has_hsdp = parallel.num_nodes > 1 and parallel.precision != "16-mixed"
    if has_hsdp and state / parallel.devices <= usable:
        sharded = f"sharded over the {parallel.devices} devices of a node they do"
        return "hsdp", f"{needs} do not fit in {has}; {sharded}"
    fits = "they do" if state / parallel.world_size <= usable else "they may not either"
    sharded = f"sharded over {parallel.world_size} devices {fits}"
    return "fsdp", f"{needs} do not fit in {has}; {sharded}"


def format_gib(size: float) -> str:
    """Returns a size as people read it: 1.25 GiB."""
    return f"{size / 2**30:.3g} GiB"
