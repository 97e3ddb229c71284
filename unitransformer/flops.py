"""Parameters and floating-point operations of a config, by arithmetic alone.

A multiply-add is two operations; the backward pass costs twice the forward, once where the input
is data and needs no gradient. Conventions differ in
what they count, so a count is never given without the name of its convention:

- `6n`: 6 x parameters (Kaplan et al. 2020, section 2.1)
- `palm`: 6 x parameters + 12 x layers x width x positions, attention in full (Chowdhery et al.
  2022, appendix B)
- `matmul`: what the matrix multiplications of a step really do: attention in full, word vectors
  looked up (not counted), the head only where the loss looks, the last layer only there too
- `matmul_causal`: the same, with the half of attention that a causal mask leaves; equal to
  `matmul` for BERT and ViT
"""

from unitransformer.config import ModelConfig, RunConfig


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


def count_looked_at(config: RunConfig) -> int:
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
    model, positions = config.model, config.sequence_length
    asked = count_looked_at(config)
    before = (model.num_layers - 1) * _layer_flops(model, positions, positions, causal=causal)
    last = _layer_flops(model, positions, asked, causal=causal)
    head = 2.0 * asked * model.width * model.num_classes
    return 3 * (before + last + head) + 2 * _embedding_flops(model, positions)


def _layer_flops(model: ModelConfig, positions: int, asked: int, *, causal: bool) -> float:
    """One layer that reads `positions` and answers at `asked` of them."""
    width, hidden = model.width, model.feedforward_width
    keys_and_values = 2.0 * positions * width * 2 * width
    query_and_out = 2.0 * asked * width * 2 * width
    seen = (positions + 1) / 2 if causal and model.causal else positions
    attention = 2.0 * asked * seen * 2 * width
    feedforward = 2.0 * asked * 2 * width * hidden
    return keys_and_values + query_and_out + attention + feedforward


def _embedding_flops(model: ModelConfig, positions: int) -> float:
    if model.patch_size is None:
        return 0.0
    return 2.0 * (positions - 1) * model.num_channels * model.patch_size**2 * model.width


def count_flops(config: RunConfig) -> dict[str, float]:
    """Training FLOPs per token (BERT, GPT) or per picture (ViT), by convention."""
    model, positions = config.model, config.sequence_length
    parameters = count_parameters(model)
    per_token_to_unit = positions / config.tokens_per_sample  # a picture is all its positions
    attention = 12.0 * model.num_layers * model.width * positions
    return {
        "6n": 6.0 * parameters * per_token_to_unit,
        "palm": (6.0 * parameters + attention) * per_token_to_unit,
        "matmul": flops_per_sample(config, causal=False) / config.tokens_per_sample,
        "matmul_causal": flops_per_sample(config, causal=True) / config.tokens_per_sample,
    }
