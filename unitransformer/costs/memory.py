"""Computes the memory that a rank needs to train a config, and chooses a strategy by it.

Weights, gradients and AdamW's two moments are exact, and so is what the forward pass of a GPU saves
for the backward pass. Temporary buffers and gathered shards belong to the headroom.
"""

import math
from dataclasses import dataclass, replace

from unitransformer.config import ActivationCheckpointing, ModelConfig, RunConfig, Strategy
from unitransformer.costs.flops import count_parameters, count_predicted_positions

# A head with fewer operations a step is as fast at once, and its logits are small.
MIN_BLOCKED_FLOPS = 10e9
MIN_LOSS_BLOCK = 64  # rows or columns; products of fewer are slow, and there are many
LOSS_ROWS = 1024  # whose logits a blocked loss holds, so that their memory has a bound
HEADROOM = 0.1  # share of a device's memory for buffers, fragmentation and the runtime


def state_bytes(config: RunConfig) -> int:
    """Returns the bytes of weights, gradients and moments: 16 per parameter, 8 in bf16-true."""
    size = 2 if config.parallel.precision == "bf16-true" else 4
    return 4 * size * count_parameters(config.model)


def activation_bytes(config: RunConfig) -> int:
    """Returns what a micro-batch needs at most, at one of two moments of its backward pass.

    It begins with three matrices in float32: the log-probabilities, and the gradients of these and
    of the logits. A loss in blocks has one, and a copy in 16 bits. With activation checkpointing,
    it later recomputes what a layer saves.
    """
    rows = _predicted_rows(config)
    per_logit: float = 8 * rows
    if keeps_gradients(config):
        is_copied = config.parallel.precision != "32-true"
        per_logit = (6 if is_copied else 4) * min(rows, loss_rows(config))
    layer = 0
    if config.parallel.activation_checkpointing != "off":
        layer = layer_bytes(config)
    return saved_bytes(config) + max(int(per_logit * config.num_logits), layer)


def has_blocked_loss(config: RunConfig) -> bool:
    """Whether a run measures the blocks of its loss: a large head on a CPU, in float32.

    A compiler divides the loss itself, and float16's gradients need the scaled loss.
    """
    parallel = config.parallel
    if parallel.accelerator != "cpu" or parallel.compile != "off":
        return False
    products = 6.0 * _predicted_rows(config) * config.model.width * config.num_logits
    return parallel.precision == "32-true" and products >= MIN_BLOCKED_FLOPS


def keeps_gradients(config: RunConfig) -> bool:
    """Whether the loss makes its gradients in the forward pass and keeps them, not the logits."""
    is_given = bool(config.loss_chunk or config.loss_block)
    return is_given or (config.loss_block is None and has_blocked_loss(config))


def loss_rows(config: RunConfig) -> float:
    """Returns the rows whose logits are in memory at once; infinite if all are."""
    if config.loss_chunk:
        return config.loss_chunk
    is_measured = config.loss_block is None and has_blocked_loss(config)
    return LOSS_ROWS if is_measured else math.inf


def check_loss_blocks(config: RunConfig) -> None:
    """Raises ValueError for blocks so small that the loss takes many times as long as a step.

    Each product then reads or writes as much memory as a large one, for hardly any result. Measured
    with GPT `reference`, 32 samples: `loss_block` 1 takes 240 s a step.
    """
    totals = {"loss_chunk": _predicted_rows(config), "loss_block": config.num_logits}
    units = {"loss_chunk": "rows of logits", "loss_block": "logits of each row"}
    for name, total in totals.items():
        size = getattr(config, name) or total
        if size < MIN_LOSS_BLOCK and total > size * MIN_LOSS_BLOCK:
            option = name.replace("_", "-")
            raise ValueError(
                f"{option} is {size}: the loss would compute the {total:,} {units[name]} in "
                f"{math.ceil(total / size):,} blocks, which is very slow; give at least "
                f"{MIN_LOSS_BLOCK}, or 0 for all at once"
            )


def saved_bytes(config: RunConfig) -> int:
    """Returns what the forward pass of a micro-batch keeps for the backward pass.

    That is what the layers, the head and the loss save, and autocast's copies of the weights.
    """
    return sum(saved_by_kind(config).values())


def saved_by_kind(config: RunConfig) -> dict[str, int]:
    """Returns `saved_bytes` by what it is kept for."""
    model, sizes = config.model, _sizes(config)
    rows, last_rows = config.batch_size * config.sequence_length, _predicted_rows(config)
    mode = config.parallel.activation_checkpointing
    per_input, per_output = _layer_bytes(model, sizes, mode)
    layers = per_input * rows * model.num_layers
    layers += per_output * (rows * (model.num_layers - 1) + last_rows)
    if mode == "off" and last_rows < rows and sizes.norm > sizes.product:
        # The last layer gathers positions, which saves the result of its norm and, where that is
        # not the norm's input, its own input.
        shares_input = sizes.residual == sizes.norm
        layers += rows * model.width * (sizes.norm + (0 if shares_input else sizes.residual))
    embedding = rows * sizes.product * _patch_values(model)
    embedding += rows * sizes.mask(sizes.residual) * model.width
    head = last_rows * model.width * (sizes.product + (sizes.norm if model.final_norm else 0))
    if keeps_gradients(config):  # of the head and of its input; otherwise the log-probabilities
        logits = (4 * config.num_logits + sizes.product * last_rows) * model.width
    else:
        logits = 4 * last_rows * config.num_logits
    return {
        "layers": layers,
        "embedding": embedding,
        "head": head,
        "logits": logits,
        "16-bit weights": _weight_copy_bytes(config, sizes),
    }


def layer_bytes(config: RunConfig) -> int:
    """Returns what a layer saves without activation checkpointing, which recomputes it."""
    per_position = sum(_layer_bytes(config.model, _sizes(config), "off"))
    return config.batch_size * config.sequence_length * per_position


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Bytes of the numbers that a step keeps."""

    product: int  # inputs and results of matrix products
    residual: int  # between the layers
    norm: int  # inputs of norms, which autocast computes in float32
    has_dropout: bool
    is_cpu: bool

    def mask(self, size: int) -> int:
        """What dropout saves per number of `size` bytes: on a CPU what it multiplies by."""
        return (size if self.is_cpu else 1) if self.has_dropout else 0


def _sizes(config: RunConfig) -> _Sizes:
    product = 4 if config.parallel.precision == "32-true" else 2
    # Patches are the result of a matrix product, and FSDP casts what enters a layer.
    is_cast = config.model.reads_images or config.parallel.is_sharded
    is_cpu = config.parallel.accelerator == "cpu"
    # On a CPU, autocast leaves a norm in the format of its input.
    norm = 4 if _uses_autocast(config) and not (is_cpu and is_cast) else product
    return _Sizes(
        product=product,
        residual=product if is_cast else norm,
        norm=norm,
        has_dropout=config.model.dropout > 0,
        is_cpu=is_cpu,
    )


def _layer_bytes(
    model: ModelConfig, sizes: _Sizes, mode: ActivationCheckpointing
) -> tuple[int, int]:
    """Returns what a layer saves for a position of its input, and for one that it computes."""
    width, hidden, product = model.width, model.feedforward_width, sizes.product
    # In float32: mean and deviation of a norm, and the log of a head's sum of exponentials.
    statistics, heads = 8, 4 * model.num_heads
    match mode:
        case "full":  # the input
            return sizes.residual * width, 0
        case "selective":  # the input, and the results of matrix products and attention
            per_output = product * (4 * width + hidden) + heads
            return (sizes.residual + 2 * product) * width, per_output
    # ReLU saves its result, which without dropout is also the input of the next matrix.
    num_hidden = 1 if model.activation == "relu" and not sizes.has_dropout else 2
    feedforward = (num_hidden * product + sizes.mask(product)) * hidden
    # norm 1, its result, keys and values | queries, attention, norm 2, its result
    per_input = (sizes.norm + 3 * product) * width + statistics
    return per_input, per_input + heads + feedforward


def _predicted_rows(config: RunConfig) -> int:
    return config.batch_size * count_predicted_positions(config)


def _patch_values(model: ModelConfig) -> int:
    return model.num_channels * model.patch_size**2 if model.patch_size else 0


def _uses_autocast(config: RunConfig) -> bool:
    parallel = config.parallel
    return parallel.precision.endswith("mixed") and not parallel.uses_deepspeed


def _weight_copy_bytes(config: RunConfig, sizes: _Sizes) -> int:
    """Returns the padded copy of the head, and autocast's 16-bit copies of whole matrices.

    Sharded layers are gathered in 16 bits.
    """
    model, width = config.model, config.model.width
    has_copies = _uses_autocast(config) and not config.parallel.is_sharded
    head = 2 * width * model.num_classes if has_copies else 0
    if config.num_logits > model.num_classes:
        head = sizes.product * width * config.num_logits
    if keeps_gradients(config):  # in the forward pass, which frees its copy
        head = 0
    if not has_copies:
        return head
    layers = model.num_layers * (4 * width + 2 * model.feedforward_width)
    return head + 2 * width * (layers + _patch_values(model))


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
    return _with(config, strategy), reason


def _choose(config: RunConfig, memory_bytes: int | None) -> tuple[Strategy, str]:
    """Returns the strategy and the reason; `fsdp` may mean `fsdp1`."""
    parallel = config.parallel
    state = state_bytes(config)
    if parallel.cpu_offload:
        reason = f"cpu-offload keeps the state of {format_gib(state)} in host memory"
        return "fsdp", f"{reason}; single and ddp keep it on the device"
    if parallel.world_size == 1:
        return "single", "one device"
    activations = activation_bytes(_with(config, "ddp"))
    needs = f"state {format_gib(state)} + activations about {format_gib(activations)}"
    if memory_bytes is None:
        return "ddp", f"{needs}; the memory of a device is unknown"
    has = f"the {format_gib(memory_bytes)} per device, with a tenth left free"
    usable = (1 - HEADROOM) * memory_bytes
    if state + activations <= usable:
        return "ddp", f"{needs} fit in {has}"
    usable -= activation_bytes(_with(config, "fsdp1"))  # sharded, in any precision
    # fsdp1 shards 16-mixed over all devices, so a node's share does not matter.
    has_hsdp = parallel.num_nodes > 1 and parallel.precision != "16-mixed"
    if has_hsdp and state / parallel.devices <= usable:
        sharded = f"sharded over the {parallel.devices} devices of a node they do"
        return "hsdp", f"{needs} do not fit in {has}; {sharded}"
    fits = "they do" if state / parallel.world_size <= usable else "they may still not fit"
    sharded = f"sharded over {parallel.world_size} devices {fits}"
    return "fsdp", f"{needs} do not fit in {has}; {sharded}"


def _with(config: RunConfig, strategy: Strategy) -> RunConfig:
    return replace(config, parallel=replace(config.parallel, strategy=strategy))


def format_gib(size: float) -> str:
    """Returns a size as people read it: 1.25 GiB."""
    return f"{size / 2**30:.3g} GiB"
