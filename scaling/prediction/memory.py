"""Predicts the peak memory of one device in a training step, by category and by moment.

The peak is at one of some moments: in the forward pass of the first layer, of the last one or of
that before it, when the forward pass ends, when the backward pass begins, in the backward pass of
the head, in that of the last layer or at its end, when the backward pass ends, or in the optimizer
step. Where layers are gathered, the layer before the last has moments of its own: it works beside
the reduction of the last one, which may compute only some positions. Each is the sum of what is
alive then. Counted is what torch allocates; the context of the device is added, fragmentation is
not.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scaling.prediction.hardware import Hardware
from scaling.prediction.layer_sizes import (
    added_layer_bytes,
    copied_layer_bytes,
    count_head_numbers,
    new_gradient_size,
    product_size,
    sizes_between_products,
)
from scaling.prediction.moment import Moment
from scaling.prediction.parameters import count_numbers, layer_parameters
from scaling.prediction.rank_states import rank_states
from scaling.prediction.recomputed_layers import recomputed_layers
from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_predicted_positions
from unitransformer.costs.memory import keeps_gradients, layer_bytes, loss_rows, saved_by_kind

SYNTHETIC_NUMBERS = 2**18  # of `unitransformer.data.sources`, drawn once for all samples
# Images of each digit in `unitransformer/data/digits.npz`.
NUM_DIGITS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
# Share of the allocated peak that CUDA's allocator reserves beyond it, as a guess from records.
FREE_SHARE = 0.05
# Errors that tests allow of the allocated bytes, against counted steps and rehearsals.
LOWEST_ERROR, LARGEST_ERROR = -0.03, 0.08


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device at the moment of its peak; the categories add up to `total_bytes`."""

    moment: str
    parameters: int
    gradients: int
    optimizer: int
    gathered: int  # whole weights of sharded layers
    activations: Mapping[str, int]  # what the forward pass keeps, by what keeps it
    logits: int  # and what the loss computes from them
    communication: int  # buffers of gradients and collectives
    inputs: int  # samples and the table of positions
    context: int  # driver, libraries and communicators
    capacity: int  # of the device

    @property
    def allocated_bytes(self) -> int:
        """What torch's allocator hands out."""
        named = self.parameters + self.gradients + self.optimizer + self.gathered
        named += self.logits + self.communication + self.inputs
        return named + sum(self.activations.values())

    @property
    def total_bytes(self) -> int:
        return self.allocated_bytes + self.context

    @property
    def fits(self) -> bool:
        """Whether the peak and a twentieth of it, for fragmentation, fit on the device."""
        return self.total_bytes + FREE_SHARE * self.allocated_bytes <= self.capacity


def _new_head_gradients(config: RunConfig, scratch: int) -> int:
    """Returns the gradients of the head at the end of its product, or of the copy that follows.

    The float32 copy of autocast is made when the product's 16-bit copy of the weights is gone.
    """
    size, copied = new_gradient_size(config), 0
    if size > 4:
        size, copied = 2, size - 2
    return max(size + scratch, copied) * count_head_numbers(config)


def _early_gradients(config: RunConfig) -> int:
    """Returns the gradients that `single` and `ddp` have in the backward pass of the last layer.

    DDP has copied finished ones into its buckets; those of the matrix that is computed are new.
    """
    model = config.model
    if config.parallel.strategy not in ("single", "ddp"):
        return 0
    matrix = new_gradient_size(config) * model.width * model.feedforward_width
    if config.parallel.strategy == "ddp" or config.accumulate > 1:
        return matrix
    # The layer that needs most is the one before, if the last one computes only some positions.
    finished = count_head_numbers(config)
    if _freed_layer(config):
        finished += count_numbers(layer_parameters(model))
    return matrix + (2 if config.parallel.precision == "bf16-true" else 4) * finished


def predict_memory(config: RunConfig, hardware: Hardware) -> Memory:
    """Returns the memory of one device at its peak.

    Args:
        config: with a strategy other than `auto`, and the accelerator of the hardware.
    """
    moments = _moments(config, scratch=_scratch_bytes(config, hardware))
    return _on(max(moments, key=lambda moment: moment.allocated_bytes), hardware)


def _scratch_bytes(config: RunConfig, hardware: Hardware) -> int:
    """Returns what a matrix product needs beside its result, in bytes per number of the result.

    oneDNN computes a product of bfloat16 numbers in float32, and converts the whole result at the
    end, on a CPU without instructions for bfloat16: one on which they are slower than float32.
    """
    peaks = hardware.peak_flops
    is_slower = peaks.get("bfloat16", math.inf) < peaks.get("float32", 0.0)
    is_half = config.parallel.precision.startswith("bf16")
    return 4 if config.parallel.accelerator == "cpu" and is_half and is_slower else 0


def _on(memory: Moment, hardware: Hardware) -> Memory:
    return Memory(
        **{name: getattr(memory, name) for name in Moment.__dataclass_fields__},
        context=hardware.context_bytes,
        capacity=hardware.memory_bytes,
    )


def _moments(config: RunConfig, *, scratch: int) -> tuple[Moment, ...]:
    states, parallel = rank_states(config), config.parallel
    saved = saved_by_kind(config)
    saved_logits = saved.pop("logits")
    saved = {kind: size for kind, size in saved.items() if size}
    common: dict[str, Any] = {
        "parameters": states.parameters,
        "optimizer": states.optimizer,
        "inputs": _input_bytes(config),
    }
    accumulated = states.gradients if config.accumulate > 1 else 0
    previous = states.gradients if states.is_gradient_kept else accumulated
    # DDP's gradients are views of its buckets, which stay; so does an array of ZeRO-3.
    stays = parallel.strategy in ("ddp", "zero3")
    remaining = states.gradients if stays else accumulated
    copies = _copied_images(config)
    first = Moment(
        **common,
        moment="forward pass of the first layer",
        gradients=previous,
        gathered=states.gathered
        - (config.model.num_layers - 1) * states.late_layer
        + states.gathered_layer,
        activations={"embedding": saved["embedding"]} if "embedding" in saved else {},
        communication=states.root_buffers + copies + states.kept_buffers,
    )
    layers = config.model.num_layers
    recomputes = parallel.activation_checkpointing != "off"
    if recomputes and (copied := copied_layer_bytes(config)):
        saved["16-bit weights"] -= layers * copied
    of_last = _freed_layer(config) or saved["layers"] // layers
    last = Moment(
        **common,
        moment="forward pass of the last layer",
        gradients=previous,
        gathered=states.gathered + states.gathered_layer,
        activations=saved | {"layers": saved["layers"] - of_last, "head": 0},
        communication=states.layer_buffers + copies + states.kept_buffers,
    )
    forward = Moment(
        **common,
        moment="end of the forward pass",
        gradients=previous,
        gathered=states.gathered + states.last_layer,
        activations=saved,
        logits=saved_logits + _forward_logits(config),
        communication=copies + states.kept_buffers,
    )
    begin = Moment(
        **common,
        moment="begin of the backward pass",
        gradients=remaining,
        gathered=states.gathered + states.gathered_layer,
        activations=saved,
        logits=saved_logits + _backward_logits(config),
        communication=states.kept_buffers,
    )
    head = Moment(
        **common,
        moment="backward pass of the head",
        gradients=remaining + _new_head_gradients(config, scratch),
        gathered=states.gathered + states.gathered_layer,
        activations=saved,
        logits=_gradient_of_logits(config),
        communication=states.kept_buffers,
    )
    model, rows = config.model, config.batch_size * config.sequence_length
    number = 4 if parallel.precision == "32-true" else 2
    # Otherwise one moment stands for the last layer and the one before it.
    has_both = states.layer_shard > 0 and layers > 1
    backward_gathered = states.gathered - states.released_head

    def backward(
        name: str, *, freed: int, results: int, gathered: int, communication: int, early: int = 0
    ) -> Moment:
        """In the backward pass of a layer, when `freed` bytes of activations are gone.

        Args:
            results: bytes of the gradients of the layer's results.
            early: bytes of gradients that are there before the layer's own.
        """
        return Moment(
            **common,
            moment=name,
            gradients=remaining + early,
            gathered=gathered,
            activations=saved
            | {"layers": saved["layers"] - freed}
            | {"gradients of a layer's results": results},
            logits=saved_logits if keeps_gradients(config) else 0,
            communication=communication + states.kept_buffers,
        )

    def following(finished: int) -> int:
        """Bytes of the layer that is gathered next, after `finished` backward passes."""
        return states.next_layer if layers - finished > 1 else 0

    def inside(name: str, finished: int, freed: int) -> Moment:
        """Inside the backward pass of a layer, after that of `finished` others."""
        is_last = has_both and not finished
        return backward(
            name,
            freed=freed,
            results=_layer_gradients(config, is_last, scratch),
            # That which computes, and the next one if there is one.
            gathered=backward_gathered
            - finished * states.released_layer
            + states.gathered_layer
            + following(finished),
            communication=states.layer_gradients
            + (states.reduced_layer + states.layer_shard if finished else 0)
            + states.buffers,
            early=_early_gradients(config),
        )

    def layer_end(name: str, finished: int, freed: int) -> Moment:
        """When a layer's gradients are copied to be reduced, after those of `finished` others."""
        return backward(
            name,
            freed=freed,
            results=4 * number * rows * model.width,
            # Of the next one: what computed is dropped before.
            gathered=backward_gathered
            - (finished + 1) * states.released_layer
            + following(finished),
            communication=states.all_layer_gradients
            + states.reduced_layer
            + (finished + (states.reduced_layer > 0)) * states.layer_shard
            + states.buffers,
        )

    def reduction(name: str, finished: int, freed: int) -> Moment:
        """When a layer's gradients are reduced at once, after those of `finished` others."""
        return backward(
            name,
            freed=freed,
            results=number * rows * model.width,
            gathered=states.gathered + following(finished),
            communication=states.head_gradients + states.reduction + finished * states.layer_shard,
        )

    in_layers = (
        list(recomputed_layers(config, common, remaining, scratch))
        if recomputes
        else [
            inside("backward pass of the last layer", 0, _freed_layer(config)),
            layer_end("end of the last layer's backward pass", 0, saved["layers"] // layers),
        ]
    )
    if has_both and not recomputes:
        # The layer before works beside the reduction of the last one, whose activations are gone.
        in_layers[0] = inside("backward pass of the last layer", 0, 0)
        in_layers[1] = layer_end("end of the last layer's backward pass", 0, of_last)
        before = (saved["layers"] - of_last) // (layers - 1)
        in_layers += [
            inside("backward pass of the layer before the last", 1, of_last),
            layer_end(
                *("end of the backward pass of the layer before the last", 1, of_last + before)
            ),
        ]
    if states.next_layer and layers > 2 and parallel.accelerator == "cpu":
        # gloo receives the weights of the next layer in an array of its own, and copies them. The
        # layer that will use its weights now begins its backward pass, and that before is reduced.
        others = (saved["layers"] - of_last) // (layers - 1)
        in_layers += [
            backward(
                "gather of a layer in the backward pass",
                freed=of_last + (finished - 1) * others,
                results=number * rows * model.width,
                gathered=states.gathered + states.gathered_layer + 2 * states.next_layer,
                communication=states.head_gradients
                + states.reduced_layer
                + finished * states.layer_shard,
            )
            for finished in {1, layers - 2}
        ]
    end = Moment(
        **common,
        moment="end of the backward pass",
        gradients=states.waiting_gradients or states.gradients,
        communication=states.root_gradients
        + states.kept_buffers
        + (states.buffers if states.waiting_gradients else 0),
    )
    step = Moment(
        **common,
        moment="optimizer step",
        gradients=states.gradients,
        communication=states.step + states.kept_buffers,
    )
    if states.reduction and not states.reduced_layer and not recomputes:
        # FSDP1 reduces a layer when its backward pass is over.
        for finished in {0, 1, layers - 2, layers - 1} & set(range(layers)):
            freed = of_last + finished * ((saved["layers"] - of_last) // max(1, layers - 1))
            in_layers.append(reduction("reduction of a layer", finished, freed))
    feedforward = _forward_layers(config, common, previous, saved, scratch)
    moments = [first, last, *feedforward, forward, begin, *in_layers, end, step]
    if parallel.uses_deepspeed and states.buffers:
        # The first gradient that is ready makes DeepSpeed allocate its buckets.
        is_made = keeps_gradients(config)  # by the loss
        bucket = Moment(
            **common,
            moment="reduction of the first gradients",
            gradients=remaining
            + (0 if is_made else new_gradient_size(config) * count_head_numbers(config)),
            activations=saved | {"head": 0},
            logits=saved_logits if is_made else 0,
            communication=states.buffers + states.kept_buffers,
        )
        moments.append(bucket)
    # A loss that keeps gradients has those of the head since the forward pass.
    return tuple(moments) if keeps_gradients(config) else (*moments, head)


def _forward_layers(
    config: RunConfig,
    common: Mapping[str, Any],
    previous: int,
    saved: Mapping[str, int],
    scratch: int,
) -> Iterator[Moment]:
    """Yields moments of the forward pass, in the feed-forward of the last two layers.

    Beside what the layers keep, there is what this one has made and does not keep.
    """
    states, layers = rank_states(config), config.model.num_layers
    of_last = saved["layers"] - (layers - 1) * added_layer_bytes(config)
    made = _made_in_feedforward(config, scratch)
    names = {0: "last layer", 1: "layer before the last"}
    for later in range(min(2, layers)):
        positions = config.sequence_length if later else count_predicted_positions(config)
        kept = saved["layers"] - (of_last if later else 0)
        yield Moment(
            **common,
            moment=f"feed-forward of the {names[later]}",
            gradients=previous,
            gathered=states.gathered - later * states.late_layer + states.gathered_layer,
            activations={**saved, "layers": kept, "head": 0}
            | {"results inside a layer": config.batch_size * positions * made},
            communication=states.layer_buffer + _copied_images(config) + states.kept_buffers,
        )


def _made_in_feedforward(config: RunConfig, scratch: int) -> int:
    """Returns the bytes of a position that a feed-forward has beside what its layer keeps.

    The first product may need scratch memory; then the activation has its input and its result.
    What attention adds to the residual stays until the layer is done, and so does the result of a
    norm that autocast computes in float32, beside its copy.
    """
    model, size = config.model, product_size(config)
    residual, norm = sizes_between_products(config)
    match config.parallel.activation_checkpointing:
        case "full":  # keeps none of them, and neither their sum nor the norm's result
            width = size + residual + norm + (size if norm != size else 0)
            return width * model.width + (size + max(size, scratch)) * model.feedforward_width
        case "selective":  # keeps the results of products
            width = residual + norm + (size if norm != size else 0)
            return width * model.width + max(size, scratch) * model.feedforward_width
    # Without dropout ReLU keeps its result alone.
    is_input_kept = model.activation != "relu" or model.dropout > 0
    hidden = max(0, scratch - size) if is_input_kept else max(size, scratch)
    width = size + (norm if norm > residual else 0)
    return width * model.width + hidden * model.feedforward_width


def _freed_layer(config: RunConfig) -> int:
    """Returns what the last layer kept, if it computes only some positions.

    Without checkpointing the layer before it needs most: it computes all positions.
    """
    is_shorter = count_predicted_positions(config) < config.sequence_length
    is_first = config.model.num_layers == 1
    if not is_shorter or is_first or config.parallel.activation_checkpointing != "off":
        return 0
    others = (config.model.num_layers - 1) * layer_bytes(config)
    return max(0, saved_by_kind(config)["layers"] - others)


def _layer_gradients(config: RunConfig, is_last: bool, scratch: int) -> int:
    """Returns the gradients that are alive at the second matrix of a feed-forward.

    The last layer has them of the positions that it computes. They are those of the layer's result,
    of the activation's result and of its input.
    """
    model = config.model
    positions = count_predicted_positions(config) if is_last else config.sequence_length
    rows = config.batch_size * positions
    size = 4 if config.parallel.precision == "32-true" else 2
    # The product that makes the second of them comes first, and may need more.
    largest = max(2 * size, size + scratch)
    return rows * (largest * model.feedforward_width + size * model.width)


def _copied_images(config: RunConfig) -> int:
    """Returns the copies of a micro-batch that the forward pass has: FSDP2 casts what enters.

    They are the images in 16 bits, and in the order of their patches.
    """
    model, parallel = config.model, config.parallel
    is_cast = parallel.strategy in ("fsdp", "hsdp") and parallel.precision == "bf16-mixed"
    if model.image_size is None or not is_cast:
        return 0
    return 2 * 2 * config.batch_size * model.num_channels * model.image_size**2


def _forward_logits(config: RunConfig) -> int:
    """Returns what computing the loss needs beside what it keeps: logits, and a float32 copy.

    A loss that makes its gradients in the forward pass writes them over the logits.
    """
    rows = config.batch_size * count_predicted_positions(config)
    is_copied = config.parallel.precision != "32-true"
    copies = 6 if is_copied else 4
    return int(copies * min(rows, loss_rows(config))) * config.num_logits


def _backward_logits(config: RunConfig) -> int:
    """Returns the gradients of the log-probabilities and of the logits, in float32."""
    if keeps_gradients(config):
        return 0
    return 8 * config.batch_size * count_predicted_positions(config) * config.num_logits


def _gradient_of_logits(config: RunConfig) -> int:
    """Returns the gradient of the logits, as the products of the head read it."""
    size = 4 if config.parallel.precision == "32-true" else 2
    return size * config.batch_size * count_predicted_positions(config) * config.num_logits


def _input_bytes(config: RunConfig) -> int:
    """Returns a micro-batch, the table of positions, and the samples that are held in memory."""
    model, batch = config.model, config.batch_size
    size = 2 if config.parallel.precision == "bf16-true" else 4
    total = size * model.num_positions * model.width
    if model.image_size is not None:
        pixels = model.num_channels * model.image_size**2
        total += batch * (size * pixels + 8)
        if config.data.source == "synthetic":
            total += 4 * pixels  # the last of the samples that begin at each number
        elif config.data.source == "builtin":
            # Images of 8 x 8 pixels in float32, and labels in int64.
            total += sum(NUM_DIGITS[: model.num_classes]) * (8 * 8 * 4 + 8)
    else:
        positions = 2 * count_predicted_positions(config) if config.recipe == "bert" else 0
        total += 8 * batch * (config.sequence_length + (positions or config.sequence_length))
    if config.data.source == "synthetic":
        # Tokens and positions are int64; images are float32, and their labels int64.
        total += SYNTHETIC_NUMBERS * {"gpt": 8, "bert": 16, "vit": 12}[config.recipe]
    return total
