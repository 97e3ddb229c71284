"""Counts the bytes that strategies read and write to copy weights and gradients in a step.

On a CPU nothing hides these copies. A GPU makes them beside the computation. The norm of the
gradients and their scaling to it are no copies: every strategy has them, as part of the update.
Tests compare the counts with those of the operations of real steps.
"""

from scaling.prediction.communication import collectives_of_step, sum_size, weight_size
from scaling.prediction.parameters import count_numbers, embedding_parameters
from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_parameters

MIXED = ("bf16-mixed", "16-mixed")


def copied_bytes(config: RunConfig, *, node_size: int) -> float:
    """Returns the bytes that are read and written, per micro-batch.

    Args:
        config: of several ranks with a strategy other than `auto`, which is `single` on one.
        node_size: devices of a node.
    """
    match config.parallel.strategy:
        case "auto" | "single":
            return _cast_by_autocast(config)
        case "ddp":
            # Each gradient is copied to its place in a bucket, in the last micro-batch.
            bucket = 2.0 * sum_size(config) * count_parameters(config.model)
            return _cast_by_autocast(config) + bucket / config.accumulate
        case "fsdp" | "hsdp":
            return _copied_by_fsdp2(config, node_size)
        case "fsdp1":
            return _copied_by_fsdp1(config, node_size)
        case _:
            return _copied_by_deepspeed(config, node_size)


def _cast_by_autocast(config: RunConfig) -> float:
    """Autocast casts the weights of products to 16 bits, and their gradients back."""
    if config.parallel.precision not in MIXED:
        return 0.0
    numbers = count_parameters(config.model)
    # Rows of the embedding are read as they are; a tied matrix is also that of the head's product.
    if config.model.patch_size is None and not config.model.tied_head:
        numbers -= count_numbers(embedding_parameters(config.model))
    return 2.0 * (4 + 2) * numbers


def _gathered_numbers(config: RunConfig, node_size: int) -> float:
    """Returns how many weights the passes of a micro-batch gather, repetitions included."""
    sent = collectives_of_step(config, node_size=node_size)
    gathers = [c for c in sent if c.kind == "all_gather" and c.phase != "optimizer"]
    return sum(gather.total_bytes for gather in gathers) / weight_size(config) / config.accumulate


def _copied_by_fsdp2(config: RunConfig, node_size: int) -> float:
    """FSDP2 casts its shards and copies them together, and what is gathered to its places.

    It copies the gradients of a layer into one array, in the format of the sum, and its share of
    the sum to the gradients of the shards. On one rank it copies the weights, and gathers nothing.
    """
    parallel, numbers = config.parallel, float(count_parameters(config.model))
    size, summed = weight_size(config), sum_size(config)
    cast = 4 + size if parallel.precision in MIXED else 0
    ranks = parallel.devices if parallel.strategy == "hsdp" else parallel.world_size
    gathered = _gathered_numbers(config, node_size) if ranks > 1 else numbers
    places = 2 * size * gathered if ranks > 1 else 0.0
    shards = (cast + 2 * size) * gathered / ranks
    return places + shards + (size + summed) * numbers + 2 * summed * numbers / ranks


def _copied_by_fsdp1(config: RunConfig, node_size: int) -> float:
    """FSDP1 casts its shards, which are gathered to their places.

    It joins the gradients of a layer, casts and divides them, and copies its share of the sum.
    """
    parallel, numbers = config.parallel, float(count_parameters(config.model))
    size, summed = weight_size(config), sum_size(config)
    is_mixed = parallel.precision in MIXED
    if parallel.world_size == 1:  # casts weights for each pass, and gradients back
        return (2.0 * size + (3 * (4 + size) if is_mixed else 0)) * numbers
    casts = (4 + size) * _gathered_numbers(config, node_size) / parallel.world_size
    gradients = (2 * size + (size + summed if is_mixed else 0) + 2 * summed) * numbers
    return (casts if is_mixed else 0.0) + gradients + 2 * summed * numbers / parallel.world_size


def _copied_by_deepspeed(config: RunConfig, node_size: int) -> float:
    """DeepSpeed copies gradients into a bucket, joins them into one array, and divides it.

    Of its share it copies the gradients twice, joins them, casts them to float32 and to float64 for
    their norm, looks for the largest and smallest in 16 bits, and copies the new weights back.
    Stage 1 adds micro-batches up before. Stage 3 joins what it reduces, its shards and the weights
    that it gathers.
    """
    parallel, numbers = config.parallel, float(count_parameters(config.model))
    size, ranks, stage = weight_size(config), parallel.world_size, parallel.strategy
    share = numbers / ranks
    passes = 3 if stage == "zero3" or ranks > 1 else 2
    repeated = {"zero1": 0, "zero2": 2, "zero3": 1}[stage]  # of the copies of a share
    gradients = 2.0 * size * (passes * numbers + repeated * share)
    if stage == "zero1":
        gradients /= config.accumulate
    norm = (size + 8) + (8 - 4)  # float64 is written and read; reading float32 is part of any norm
    of_step = (2 - repeated) * 2 * size + 2 * size + norm + (4 + size)
    if size == 2:
        of_step += (size + 4) + (2 * size if stage != "zero3" else 0)
    gathered = _gathered_numbers(config, node_size) if stage == "zero3" else 0.0
    joined = 2.0 * size * gathered * (1 + 1 / ranks)
    return gradients + joined + of_step * share / config.accumulate
