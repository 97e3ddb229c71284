"""Two networks as people write them without a library: plain PyTorch, and nanoGPT-style.

Both have the mathematics of `Transformer` and take its weights, but compute every position in every
layer.

B batch | T positions | D width | H heads | V classes
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unitransformer.config import ModelConfig


class PlainLayer(nn.Module):
    """A pre-norm layer made of PyTorch's own modules."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(model.width, model.num_heads, batch_first=True)
        self.ln1 = nn.LayerNorm(model.width)
        self.ln2 = nn.LayerNorm(model.width)
        self.feedforward = nn.Sequential(
            nn.Linear(model.width, model.feedforward_width),
            nn.ReLU() if model.activation == "relu" else nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(model.feedforward_width, model.width),
        )

    def forward(self, x_BTD: Tensor, mask_TT: Tensor | None) -> Tensor:
        normed = self.ln1(x_BTD)
        attended, _ = self.mha(
            normed,
            normed,
            normed,
            attn_mask=mask_TT,
            is_causal=mask_TT is not None,
            need_weights=False,
        )
        x_BTD = x_BTD + attended
        out: Tensor = x_BTD + self.feedforward(self.ln2(x_BTD))
        return out


class PlainNetwork(nn.Module):
    """Token embedding or patches, sinusoids, layers of `nn.MultiheadAttention`, linear head."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        if model.patch_size is None:
            self.tokens = nn.Embedding(model.num_classes, model.width)
        else:
            self.class_embedding = nn.Parameter(torch.zeros(1, 1, model.width))
            self.patches = nn.Conv2d(
                model.num_channels, model.width, model.patch_size, stride=model.patch_size
            )
        self.sinusoids: Tensor
        self.register_buffer("sinusoids", torch.zeros(1, model.num_positions, model.width))
        self.layers = nn.ModuleList(PlainLayer(model) for _ in range(model.num_layers))
        self.norm = nn.LayerNorm(model.width) if model.final_norm else nn.Identity()
        self.head = nn.Linear(model.width, model.num_classes, bias=model.head_bias)
        if model.tied_head:
            self.head.weight = self.tokens.weight

    def states(self, inputs: Tensor) -> Tensor:
        """Returns the head's input at all positions, (B, T, D)."""
        if self.model.patch_size is None:
            x_BTD = self.tokens(inputs) * math.sqrt(self.model.width)
        else:
            patches = self.patches(inputs).flatten(2).transpose(1, 2)
            classes = self.class_embedding.expand(len(inputs), -1, -1).to(patches.dtype)
            x_BTD = torch.cat([classes, patches], dim=1)
        length = x_BTD.shape[1]
        x_BTD = x_BTD + self.sinusoids[:, :length].to(x_BTD.dtype)
        mask = None
        if self.model.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(length, device=inputs.device)
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask)
        out: Tensor = self.norm(x_BTD)
        return out

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns logits: (B, T, V), of images (B, V)."""
        states = self.states(inputs)
        logits: Tensor = self.head(states if self.model.patch_size is None else states[:, 0])
        return logits

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Loads the state dict of a `Transformer`."""
        names = {"lut.weight": "weight", "lm_head": "head", "final_norm": "norm"}
        names |= {"transformer_layers": "layers", "embedding": "tokens", "pe.pe": "sinusoids"}
        names |= {"class_tokens": "class_embedding", "linear_mapper": "patches", ".fcn.": "."}
        renamed = _rename(weights, names)
        if self.model.patch_size is not None:  # a convolution has the same weights, folded
            matrix = renamed["patches.weight"]
            renamed["patches.weight"] = matrix.view(self.patches.weight.shape)
        self.load_state_dict(renamed)


class NanoLayer(nn.Module):
    """One projection for query, key and value, then PyTorch's fused attention."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.num_heads = model.num_heads
        self.ln_1 = nn.LayerNorm(model.width)
        self.c_attn = nn.Linear(model.width, 3 * model.width)
        self.c_proj = nn.Linear(model.width, model.width)
        self.ln_2 = nn.LayerNorm(model.width)
        self.mlp_in = nn.Linear(model.width, model.feedforward_width)
        self.activation = nn.ReLU() if model.activation == "relu" else nn.GELU()
        self.mlp_out = nn.Linear(model.feedforward_width, model.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self._attend(self.ln_1(x_BTD))
        out: Tensor = x_BTD + self.mlp_out(self.activation(self.mlp_in(self.ln_2(x_BTD))))
        return out

    def _attend(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x_BTD).split(width, 2))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(mixed.transpose(1, 2).contiguous().view(batch, length, width))
        return out


class NanoGPT(nn.Module):
    """A decoder as nanoGPT writes it, with the sinusoids and the scaled embedding of this suite."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.scale = math.sqrt(model.width)
        self.wte = nn.Embedding(model.num_classes, model.width)
        self.wpe: Tensor
        self.register_buffer("wpe", torch.zeros(1, model.num_positions, model.width))
        self.h = nn.ModuleList(NanoLayer(model) for _ in range(model.num_layers))
        self.ln_f = nn.LayerNorm(model.width) if model.final_norm else nn.Identity()
        self.lm_head = nn.Linear(model.width, model.num_classes, bias=model.head_bias)
        if model.tied_head:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Returns the mean cross entropy."""
        x_BTD = self.wte(tokens_BT) * self.scale + self.wpe[:, : tokens_BT.shape[1]]
        for block in self.h:
            x_BTD = block(x_BTD)
        logits = self.lm_head(self.ln_f(x_BTD))
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets_BT.reshape(-1))

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Loads the state dict of a `Transformer`."""
        names = {"embedding.lut": "wte", "pe.pe": "wpe", "transformer_layers": "h"}
        names |= {"final_norm": "ln_f", "ln1": "ln_1", "ln2": "ln_2", "mha.out_proj": "c_proj"}
        names |= {"mha.in_proj_": "c_attn.", "feedforward.fcn.0": "mlp_in"}
        names |= {"feedforward.fcn.3": "mlp_out"}
        self.load_state_dict(_rename(weights, names))


def _rename(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Any]:
    renamed = {}
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed
