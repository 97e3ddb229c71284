"""A config as a Mermaid flowchart: what is built, and what the loss looks at."""

from unitransformer.config import ModelConfig, RunConfig
from unitransformer.costs.flops import count_predicted_positions
from unitransformer.record.units import count


def draw_architecture(config: RunConfig) -> str:
    """A Mermaid flowchart of what `config` builds and what its loss looks at.

    No label begins with + or -: Mermaid would take it for a list and refuse.
    """
    model, asked = config.model, count_predicted_positions(config)
    length = count(config.sequence_length, "position")
    layers = f"{count(model.num_layers, 'layer')}{', one after the other' * (model.num_layers > 1)}"
    norm = f'final_norm["LayerNorm {model.width:,}"] --> ' if model.final_norm else ""
    return "\n".join(
        [
            "flowchart TB",
            *_input_nodes(config),
            f'    positions["sinusoidal encoding of {length} added{_dropout(model)}"]',
            "    embedding --> positions",
            f'    subgraph layers["{layers}"]',
            *(f"        {line}" for line in _layer_nodes(model)),
            "    end",
            "    positions --> norm1 & add1",
            f'    add2 -- "{_looked_at(config, asked)}" --> {norm}head',
            f'    head["{_head(model)}"] --> loss(["{_loss(config, asked)}"])',
        ]
    )


def _input_nodes(config: RunConfig) -> list[str]:
    model, length = config.model, config.sequence_length
    if model.image_size is None or model.patch_size is None:
        words = f"{model.num_classes:,} tokens"
        hidden = f", {config.data.mask_fraction:.0%} masked"
        chosen = hidden if config.recipe == "bert" else ""
        return [
            f'    input(["{count(length, "token")}{chosen}"]) --> embedding',
            f'    embedding["embedding: {words} x {model.width:,}<br/>times √{model.width:,}"]',
        ]
    size, patch = model.image_size, model.patch_size
    pixels = model.num_channels * patch**2
    return [
        f'    input(["image, {model.num_channels} x {size} x {size}"]) --> patches',
        f'    patches["{count(length - 1, "patch", "patches")} of {patch} x {patch} pixels<br/>'
        f'linear {pixels:,} → {model.width:,}"] --> embedding',
        f'    embedding["class token in front: {count(length, "position")} x {model.width:,}"]',
    ]


def _layer_nodes(model: ModelConfig) -> list[str]:
    sees = "causal: sees itself and what came before" if model.causal else "sees all positions"
    heads = f"{count(model.num_heads, 'head')} x {model.head_width:,}"
    hidden = f"{model.width:,} → {model.feedforward_width:,} → {model.width:,}"
    return [
        f'norm1["LayerNorm {model.width:,}"] --> attention',
        f'attention["attention: {heads}<br/>{sees}"] --> add1(("⊕"))',
        "add1 --> norm2 & add2",
        f'norm2["LayerNorm {model.width:,}"] --> feedforward',
        f'feedforward["feed-forward: {hidden}<br/>{model.activation}{_dropout(model)}"]'
        ' --> add2(("⊕"))',
    ]


def _dropout(model: ModelConfig) -> str:
    return f", dropout {model.dropout:g}" if model.dropout else ""


def _head(model: ModelConfig) -> str:
    bias = "with bias" if model.head_bias else "no bias"
    tied = ", tied to the embedding" if model.tied_head else ""
    return f"head: linear {model.width:,} → {model.num_classes:,}<br/>{bias}{tied}"


def _looked_at(config: RunConfig, asked: int) -> str:
    match config.recipe:
        case "bert":
            return f"{asked} masked of {config.sequence_length} positions"
        case "gpt":
            return f"all {count(asked, 'position')}"
        case "vit":
            return "the class token"


def _loss(config: RunConfig, asked: int) -> str:
    match config.recipe:
        case "bert":
            return f"cross entropy of {count(asked, 'masked token')}"
        case "gpt":
            return f"cross entropy of the next token, {asked} per sample"
        case "vit":
            return f"cross entropy of the label, one of {config.model.num_classes:,}"
