"""Counts parameters and FLOPs of a config by formula.

A multiply-add is two operations. The backward pass costs twice the forward pass, but the same where
the input is data and needs no gradient. Only matrix multiplications count: norms, activations,
softmax, dropout and the optimizer do not. Conventions differ in what else they count, so a count
always comes with the name of its convention.

The FLOPs of a token do not depend on the batch, on accumulation, on the number of devices, or on
`loss_chunk`: no logits are computed twice. Only `hardware` counts the padding of a vocabulary; the
others count the classes and parameters of the model.
"""

from unitransformer.config import ModelConfig, RunConfig

CONVENTIONS = {
    "6n": "6 x all parameters, including token embeddings; without attention (after Kaplan et al. "
    "2020, section 2.1)",
    "palm": "6 x all parameters + 12 x layers x width x positions: full attention (Chowdhery et "
    "al. 2022, appendix B)",
    "matmul": "the matrix products of a step: full attention, without the lookup of token "
    "embeddings, the head and the last layer only at predicted positions",
    "matmul_causal": "as `matmul`, with the half of attention that a causal mask leaves",
    "hardware": "as `matmul`, and what activation checkpointing recomputes (Korthikanti et al. "
    "2022, appendix A) and padding of the vocabulary adds",
}
MAIN_CONVENTION = "matmul"  # shown where there is room for one only


def count_parameters(model: ModelConfig) -> int:
    """Returns the number of trained parameters; equals the network's count."""
    width, hidden = model.width, model.feedforward_width
    attention = 4 * width * width + 4 * width
    feedforward = 2 * width * hidden + hidden + width
    layers = model.num_layers * (attention + feedforward + 4 * width)
    norm = 2 * width if model.final_norm else 0
    head = 0 if model.tied_head else width * model.num_classes
    bias = model.num_classes if model.head_bias else 0
    embedding = model.num_classes * width
    if model.patch_size is not None:
        embedding = model.num_channels * model.patch_size**2 * width + 2 * width
    return layers + norm + head + bias + embedding


def count_predicted_positions(config: RunConfig) -> int:
    """Returns the number of positions of a sample that enter the loss."""
    if config.recipe == "vit":
        return 1
    if config.recipe == "bert":
        return max(1, round(config.data.mask_fraction * config.sequence_length))
    return config.sequence_length


def flops_per_sample(config: RunConfig, *, causal: bool) -> float:
    """Returns the FLOPs of the matrix multiplications of a sample, forward and backward.

    With `causal`, a causal mask counts only pairs that it keeps, on average (T + 1) / 2 a position.
    """
    model = config.model
    layers = sum(_layer_flops(config, n, causal=causal) for n in _positions_by_layer(config))
    head = 2.0 * count_predicted_positions(config) * model.width * model.num_classes
    embedding = 0.0  # of patches, without the class token; token embeddings are looked up
    if model.patch_size is not None:
        patch = model.num_channels * model.patch_size**2
        embedding = 2.0 * (config.sequence_length - 1) * patch * model.width
    return 3 * (layers + head) + 2 * embedding


def recomputed_flops_per_sample(config: RunConfig) -> float:
    """Returns the FLOPs of the matrix multiplications that activation checkpointing recomputes.

    `selective` keeps their results and recomputes none. `full` recomputes a layer up to the input
    of its last matrix, whose product no gradient needs: torch's checkpoint stops there. A compiler
    that has layers and head in one graph also recomputes the output of the last layer.
    """
    if config.parallel.activation_checkpointing != "full":
        return 0.0
    positions = _positions_by_layer(config)
    last_product = 2.0 * config.model.feedforward_width * config.model.width  # per position
    layers = [_layer_flops(config, count, causal=False) for count in positions]
    is_one_graph = config.parallel.compile != "off" and not config.parallel.is_sharded
    saved = positions[:-1] if is_one_graph else positions
    return sum(layers) - sum(count * last_product for count in saved)


def padding_flops_per_sample(config: RunConfig) -> float:
    """Returns the FLOPs of the matrix multiplications with the rows that pad the vocabulary."""
    num_padding = config.num_logits - config.model.num_classes
    return 3 * 2.0 * count_predicted_positions(config) * config.model.width * num_padding


def describe_padding(config: RunConfig) -> str:
    """Returns how the vocabulary is padded, to append to a line; empty if it is not."""
    if config.num_logits == config.model.num_classes:
        return ""
    return f"; {config.model.num_classes:,} tokens are padded to {config.num_logits:,} logits"


def _positions_by_layer(config: RunConfig) -> list[int]:
    """Returns the output positions of each layer: in the last layer those that enter the loss."""
    before = [config.sequence_length] * (config.model.num_layers - 1)
    return [*before, count_predicted_positions(config)]


def _layer_flops(config: RunConfig, num_outputs: int, *, causal: bool) -> float:
    """Returns the forward FLOPs of a layer that computes `num_outputs` of all positions."""
    model, positions = config.model, config.sequence_length
    width, hidden = model.width, model.feedforward_width
    keys_and_values = 2.0 * positions * width * 2 * width
    query_and_out = 2.0 * num_outputs * width * 2 * width
    visible = (positions + 1) / 2 if causal and model.causal else positions
    attention = 2.0 * num_outputs * visible * 2 * width
    feedforward = 2.0 * num_outputs * 2 * width * hidden
    return keys_and_values + query_and_out + attention + feedforward


def count_flops(config: RunConfig) -> dict[str, float]:
    """Returns training FLOPs per token (BERT, GPT) or per image (ViT), by convention."""
    model, positions = config.model, config.sequence_length
    units = config.tokens_per_sample
    positions_per_unit = positions / units
    six_n = 6.0 * count_parameters(model)
    attention = 12.0 * model.num_layers * model.width * positions
    matmul = flops_per_sample(config, causal=False)
    overhead = recomputed_flops_per_sample(config) + padding_flops_per_sample(config)
    return {
        "6n": six_n * positions_per_unit,
        "palm": (six_n + attention) * positions_per_unit,
        "matmul": matmul / units,
        "matmul_causal": flops_per_sample(config, causal=True) / units,
        "hardware": (matmul + overhead) / units,
    }
