"""Counts the FLOPs per token of a published run from the shape of its model.

d width | L layers | T positions | N parameters | E embedding parameters

A row states layers, width, heads and vocabulary size. The feed-forward width and the heads of keys
and values are those of the public model that the row names: a general rule for GPT and MPT, the
published configs for Llama.
"""

import re
from dataclasses import dataclass
from typing import Literal, assert_never

from scaling.published.csv_rows import PublishedRow

Convention = Literal["palm", "matmul", "matmul_causal"]
Size = tuple[int, int, int, int]  # layers, width, words, positions


@dataclass(frozen=True, kw_only=True)
class Llama:
    """What the rows leave out of a Llama: gated feed-forward, no biases, untied head."""

    feedforward_width: int
    num_kv_heads: int


# By generation and billions of parameters. Llama 2: Touvron et al. 2023 (arXiv 2307.09288) and
# https://huggingface.co/meta-llama/Llama-2-70b-hf/blob/main/config.json and its sisters; 34B was
# never released, its shape is Code Llama's (arXiv 2308.12950,
# https://huggingface.co/codellama/CodeLlama-34b-hf/blob/main/config.json). Llama 3 and 3.1: table 3
# of Dubey et al. 2024 (arXiv 2407.21783).
LLAMAS = {
    (2, 7): Llama(feedforward_width=11008, num_kv_heads=32),
    (2, 13): Llama(feedforward_width=13824, num_kv_heads=40),
    (2, 34): Llama(feedforward_width=22016, num_kv_heads=8),
    (2, 70): Llama(feedforward_width=28672, num_kv_heads=8),
    (3, 8): Llama(feedforward_width=14336, num_kv_heads=8),
    (3, 70): Llama(feedforward_width=28672, num_kv_heads=8),
    (3, 405): Llama(feedforward_width=53248, num_kv_heads=8),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The parameters of a decoder that the conventions count."""

    matmul_parameters: int  # all matrices and the head, without E
    parameters: int | None  # N from the shape; None if models of this family differ


def shape_of(row: PublishedRow) -> Shape | None:
    """Returns the shape of a row's model; None if the row and the public model leave it open."""
    size = _size(row)
    if size is None:
        return None
    if re.match(r"mpt\b", row.model, re.IGNORECASE):
        return _gpt_shape(size, has_single_form=True)
    if re.match(r"(gpt|turing)", row.model, re.IGNORECASE):
        return _gpt_shape(size, has_single_form=False)
    llama = llama_of(row.model)
    if llama is None or row.num_heads is None:
        return None
    return _llama_shape(size, llama, (row.num_kv_heads or llama.num_kv_heads) / row.num_heads)


def llama_of(model: str) -> Llama | None:
    """Returns the public Llama of a name such as Llama-3.1-8B or "Llama-3-70B, 12 layers"."""
    named = re.match(r"llama[- ]?([0-9])(?:\.[0-9])?[- ]([0-9]+)b\b", model, re.IGNORECASE)
    return LLAMAS.get((int(named[1]), int(named[2]))) if named else None


def _gpt_shape(size: Size, *, has_single_form: bool) -> Shape:
    """A feed-forward of four widths, biases everywhere, learned positions, a tied head: MPT.

    https://github.com/mosaicml/llm-foundry/blob/34c28fc9199278b10193e69fb52979043b7dc1bd/llmfoundry/models/mpt/modeling_mpt.py
    Other models called GPT differ in positions and head, which their rows do not state.
    """
    layers, width, vocabulary, positions = size
    matrices = 12 * width * width
    per_layer = matrices + 13 * width  # biases and norms
    parameters = layers * per_layer + (vocabulary + positions) * width + 2 * width
    return Shape(
        matmul_parameters=layers * matrices + vocabulary * width,
        parameters=parameters if has_single_form else None,
    )


def _llama_shape(size: Size, llama: Llama, kv_share: float) -> Shape:
    layers, width, vocabulary, _ = size
    kv_width = round(width * kv_share)
    matrices = 2 * width * width + 2 * width * kv_width + 3 * width * llama.feedforward_width
    parameters = layers * (matrices + 2 * width) + 2 * vocabulary * width + width
    return Shape(matmul_parameters=layers * matrices + vocabulary * width, parameters=parameters)


def _size(row: PublishedRow) -> Size | None:
    layers, width = row.num_layers, row.width
    vocabulary, positions = row.vocabulary, row.sequence_length
    if layers is None or width is None or vocabulary is None or positions is None:
        return None
    return layers, width, vocabulary, positions


def flops_per_token(row: PublishedRow, convention: Convention) -> float | None:
    """Returns the training FLOPs per token; None if the row states too little.

    `palm` is 6N + 12LdT with every parameter in N; `matmul` replaces N by what is multiplied;
    `matmul_causal` counts half of the attention, T/2 positions per token as NVIDIA does;
    `unitransformer.costs.flops` counts the (T + 1)/2 that a mask leaves. Recomputation is not
    counted.
    """
    size, shape = _size(row), shape_of(row)
    parameters = _counted(row, shape, convention)
    if size is None or parameters is None:
        return None
    layers, width, _, positions = size
    attention = 12.0 * layers * width * positions
    match convention:
        case "palm" | "matmul":
            return 6.0 * parameters + attention
        case "matmul_causal":
            return 6.0 * parameters + attention / 2
        case unknown:
            assert_never(unknown)


def _counted(row: PublishedRow, shape: Shape | None, convention: Convention) -> int | None:
    """Returns the parameters that a convention multiplies by six, preferably as the row counts."""
    if convention == "palm" and not row.is_rounded and row.parameters is not None:
        return row.parameters
    if shape is None:
        return None
    return shape.parameters if convention == "palm" else shape.matmul_parameters
