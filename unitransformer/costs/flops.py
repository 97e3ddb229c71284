"""Parameters and floating-point operations of a config, by arithmetic alone.

A multiply-add is two operations; the backward pass costs twice the forward, once where the input
is data and needs no gradient. Only matrix multiplications count: norms, activations, softmax,
dropout and the optimizer do not. Conventions differ in what they count beyond that, so a count is
never given without the name of its convention; `CONVENTIONS` says what each one counts.

A token's count does not depend on the batch, on accumulation, on how many devices there are, or
on `loss_chunk`: a chunk's gradient is made from the logits while they exist, none is made twice.
"""

from unitransformer.config import ModelConfig, RunConfig

CONVENTIONS = {
    "6n": "6 x all parameters, word vectors too; attention left out (after Kaplan et al. 2020, "
    "section 2.1)",
    "palm": "6 x all parameters + 12 x layers x width x positions: attention in full (Chowdhery et "
    "al. 2022, appendix B)",
    "matmul": "the matrix products a step does: attention in full, word vectors looked up and not "
    "counted, the head and the last layer where the loss looks",
    "matmul_causal": "as `matmul`, with the half of attention that a causal mask leaves",
    "hardware": "as `matmul`, and what activation checkpointing does a second time (Korthikanti "
    "et al. 2022, appendix A)",
}
MAIN_CONVENTION = "matmul"  # the one shown where there is room for one


def count_parameters(model: ModelConfig) -> int:
    """Numbers that are trained; equal to the network's own count."""
    width, hidden = model.width, model.feedforward_width
    attention = 4 * width * width + 4 * width
    feedforward = 2 * width * hidden + hidden + width
    layers = model.num_layers * (attention + feedforward + 4 * width)
    norm = 2 * width if model.final_norm else 0
    head = 0 if model.tied_head else width * model.num_classes
    bias = model.num_classes if model.head_bias else 0
    return layers + norm + head + bias + _embedding_parameters(model)


def _embedding_parameters(model: ModelConfig) -> int:
    if model.patch_size is None:
        return model.num_classes * model.width
    return model.num_channels * model.patch_size**2 * model.width + 2 * model.width


def count_predicted_positions(config: RunConfig) -> int:
    """Positions of one sample whose answer the loss asks for."""
    if config.recipe == "vit":
        return 1
    if config.recipe == "bert":
        return max(1, round(config.data.mask_fraction * config.sequence_length))
    return config.sequence_length


def flops_per_sample(config: RunConfig, *, causal: bool) -> float:
    """Matrix multiplications of one sample, forward and backward.

    Args:
        causal: count only the pairs a causal mask keeps, (T + 1) / 2 a position on average, if
            the model has one.
    """
    model, asked = config.model, count_predicted_positions(config)
    layers = sum(_layer_flops(config, at, causal=causal) for at in _answered(config))
    head = 2.0 * asked * model.width * model.num_classes
    return 3 * (layers + head) + 2 * _embedding_flops(model, config.sequence_length)


def recomputed_flops_per_sample(config: RunConfig) -> float:
    """Matrix multiplications of one sample that activation checkpointing does a second time.

    `selective` keeps their results and repeats none. `full` repeats a layer up to the input of
    its last matrix, whose product no gradient needs: there torch's checkpoint stops. A compiler
    that has layers and head in one graph does not keep what the last layer gives to the head, and
    makes that again as well.
    """
    if config.parallel.activation_checkpointing != "full":
        return 0.0
    layers = [_layer_flops(config, at, causal=False) for at in _answered(config)]
    last_products = [_last_product_flops(config.model, at) for at in _answered(config)]
    is_one_graph = config.parallel.compile != "off" and not config.parallel.is_sharded
    return sum(layers) - sum(last_products[:-1] if is_one_graph else last_products)


def _last_product_flops(model: ModelConfig, asked: int) -> float:
    return 2.0 * asked * model.feedforward_width * model.width


def _answered(config: RunConfig) -> list[int]:
    """Positions each layer answers at: all, and in the last layer where the loss looks."""
    before = [config.sequence_length] * (config.model.num_layers - 1)
    return [*before, count_predicted_positions(config)]


def _layer_flops(config: RunConfig, asked: int, *, causal: bool) -> float:
    """One layer forward, which reads all positions and answers at `asked` of them."""
    model, positions = config.model, config.sequence_length
    width, hidden = model.width, model.feedforward_width
    keys_and_values = 2.0 * positions * width * 2 * width
    query_and_out = 2.0 * asked * width * 2 * width
    seen = (positions + 1) / 2 if causal and model.causal else positions
    attention = 2.0 * asked * seen * 2 * width
    feedforward = 2.0 * asked * 2 * width * hidden
    return keys_and_values + query_and_out + attention + feedforward


def _embedding_flops(model: ModelConfig, positions: int) -> float:
    """Patches to vectors, forward, the class token left out; words are looked up."""
    if model.patch_size is None:
        return 0.0
    return 2.0 * (positions - 1) * model.num_channels * model.patch_size**2 * model.width


def count_flops(config: RunConfig) -> dict[str, float]:
    """Training FLOPs per token (BERT, GPT) or per picture (ViT), by convention."""
    model, positions = config.model, config.sequence_length
    units = config.tokens_per_sample
    per_token_to_unit = positions / units  # a picture is all its positions
    six_n = 6.0 * count_parameters(model)
    attention = 12.0 * model.num_layers * model.width * positions
    matmul = flops_per_sample(config, causal=False)
    return {
        "6n": six_n * per_token_to_unit,
        "palm": (six_n + attention) * per_token_to_unit,
        "matmul": matmul / units,
        "matmul_causal": flops_per_sample(config, causal=True) / units,
        "hardware": (matmul + recomputed_flops_per_sample(config)) / units,
    }
