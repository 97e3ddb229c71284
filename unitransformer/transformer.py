"""The backbone: tokens or pictures in, logits out. BERT, GPT and ViT are three configs of it.

B batch | T positions | K chosen positions | D width | H heads | W width of one head | V classes
P patches | C channels of a picture | S pixels along a side

Names and layouts of parameters are those of the plain pre-norm model made of `nn.Embedding`,
`nn.MultiheadAttention(batch_first=True)`, `nn.LayerNorm` and `nn.Sequential(Linear, ReLU, Dropout,
Linear)`, so a state dict of one loads into the other.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from unitransformer.config import ModelConfig

# The whole values of a parameter, by its name and the parameter, whose shape alone counts.
Values = Callable[[str, Tensor], Tensor]


class Linear(nn.Linear):
    """PyTorch's, without first values: `Transformer.initialise` draws them all."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """PyTorch's, without first values."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class LayerNorm(nn.LayerNorm):
    """PyTorch's, without first values."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embeddings(nn.Module):
    """Word vectors, scaled by the square root of the width (Vaswani et al. 2017, section 3.4)."""

    def __init__(self, num_words: int, width: int) -> None:
        super().__init__()
        self.lut = Embedding(num_words, width)
        self.scale = math.sqrt(width)

    def forward(self, words_BT: Tensor) -> Tensor:
        vectors_BTD: Tensor = self.lut(words_BT)
        return vectors_BTD * self.scale


class PatchEncoding(nn.Module):
    """Cuts pictures into square patches: (B, C, S, S) -> (B, P, C * patch * patch).

    Patches run along rows, then columns; each is flattened as (channel, height, width).
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.flatten = nn.Flatten(start_dim=2)

    def forward(self, pictures_BCSS: Tensor) -> Tensor:
        size = self.patch_size
        grid = pictures_BCSS.unfold(2, size, size).unfold(3, size, size)
        patches = grid.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        flat: Tensor = self.flatten(patches)
        return flat


class PositionalEncoding(nn.Module):
    """Adds sinusoids of the position (Vaswani et al. 2017, section 3.5); nothing is learned."""

    pe: Tensor

    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pe", torch.empty(1, num_positions, width))

    @torch.no_grad()
    def initialise(self) -> None:
        _, num_positions, width = self.pe.shape
        position_T1 = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
        table_TD = torch.empty(num_positions, width)
        table_TD[:, 0::2] = torch.sin(position_T1 * rate)
        table_TD[:, 1::2] = torch.cos(position_T1 * rate[: width // 2])
        self.pe.copy_(table_TD.unsqueeze(0))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.pe[:, : x_BTD.shape[1]].to(x_BTD.dtype)


class MultiheadAttention(nn.Module):
    """Self-attention in the parameter layout of `nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x_BTD: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        """Every position looks at every position; with `positions_BK` only those look."""
        if positions_BK is None:
            qkv = functional.linear(x_BTD, self.in_proj_weight, self.in_proj_bias)
            q, k, v = qkv.chunk(3, dim=-1)
            mask = None
        else:
            width = x_BTD.shape[-1]
            q = functional.linear(
                rows_at(x_BTD, positions_BK),
                self.in_proj_weight[:width],
                self.in_proj_bias[:width],
            )
            kv = functional.linear(x_BTD, self.in_proj_weight[width:], self.in_proj_bias[width:])
            k, v = kv.chunk(2, dim=-1)
            mask = self._causal_mask(positions_BK, x_BTD.shape[1])
        mixed_BHTW = functional.scaled_dot_product_attention(
            self._split(q),
            self._split(k),
            self._split(v),
            attn_mask=mask,
            is_causal=self.causal and mask is None,
        )
        out: Tensor = self.out_proj(mixed_BHTW.transpose(1, 2).flatten(2))
        return out

    def _split(self, x_BTD: Tensor) -> Tensor:
        batch, positions, width = x_BTD.shape
        shape = (batch, positions, self.num_heads, width // self.num_heads)
        return x_BTD.view(shape).transpose(1, 2)

    def _causal_mask(self, positions_BK: Tensor, num_positions: int) -> Tensor | None:
        if not self.causal:
            return None
        seen = torch.arange(num_positions, device=positions_BK.device)
        return (seen <= positions_BK.unsqueeze(-1)).unsqueeze(1)


class PositionwiseFeedForward(nn.Module):
    """Linear, activation, dropout, linear: each position by itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fcn = nn.Sequential(
            Linear(config.width, config.feedforward_width),
            nn.ReLU() if config.activation == "relu" else nn.GELU(),
            nn.Dropout(config.dropout),
            Linear(config.feedforward_width, config.width),
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.fcn(x_BTD)
        return out


class TransformerLayer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mha = MultiheadAttention(config.width, config.num_heads, causal=config.causal)
        self.ln1 = LayerNorm(config.width)
        self.ln2 = LayerNorm(config.width)
        self.feedforward = PositionwiseFeedForward(config)

    def forward(self, x_BTD: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        """All positions, or only `positions_BK` of the result: (B, K, D)."""
        attended = self.mha(self.ln1(x_BTD), positions_BK)
        x_BTD = (x_BTD if positions_BK is None else rows_at(x_BTD, positions_BK)) + attended
        out: Tensor = x_BTD + self.feedforward(self.ln2(x_BTD))
        return out


class Transformer(nn.Module):
    """The whole network; what it reads and how it attends is in the config.

    Weights depend on `config` and `seed` alone. Built under `torch.device("meta")` it has shapes
    and no memory.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        # Shapes first, values once.
        with torch.device("meta"):
            self._build(config)
        if device.type != "meta":
            self.to_empty(device=device)
        self._tie()
        if device.type != "meta":
            self.initialise(self.first_values(seed))

    def _tie(self) -> None:
        if self.config.tied_head:
            self.lm_head.weight = self.embedding.lut.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()  # `to_empty` makes two parameters of one that two modules share
        return self

    def _build(self, config: ModelConfig) -> None:
        if config.image_size is None or config.patch_size is None:
            self.embedding = Embeddings(config.num_classes, config.width)
        else:
            pixels = config.num_channels * config.patch_size**2
            self.class_embedding = nn.Parameter(torch.empty(1, 1, config.width))
            self.patch_embedding = PatchEncoding(config.patch_size)
            self.linear_mapper = Linear(pixels, config.width)
        self.pe = PositionalEncoding(config.num_positions, config.width)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.transformer_layers = nn.Sequential(
            *(TransformerLayer(config) for _ in range(config.num_layers))
        )
        if config.final_norm:
            self.final_norm = LayerNorm(config.width)
        self.lm_head = Linear(config.width, config.num_classes, bias=config.head_bias)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, inputs: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        """Logits: (B, T, V) of all positions, (B, K, V) of the chosen ones, (B, V) of pictures.

        Args:
            inputs: words (B, T), integers, or pictures (B, C, S, S).
            positions_BK: positions whose logits are wanted; the last layer and the head leave out
                the rest.
        """
        logits: Tensor = self.lm_head(self.states(inputs, positions_BK))
        return logits

    def states(self, inputs: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        """What the head reads: (B, T, D), (B, K, D), or (B, D) of pictures' class tokens."""
        x_BTD: Tensor = self.embedding_dropout(self.pe(self._embed(inputs)))
        if self.config.reads_pictures:
            assert positions_BK is None, "pictures are read at the class token"
            positions_BK = torch.zeros(len(inputs), 1, dtype=torch.long, device=inputs.device)
        *before, last = self.transformer_layers
        for layer in before:
            x_BTD = layer(x_BTD)
        x_BTD = last(x_BTD, positions_BK)
        if self.config.final_norm:
            x_BTD = self.final_norm(x_BTD)
        return x_BTD[:, 0] if self.config.reads_pictures else x_BTD

    def _embed(self, inputs: Tensor) -> Tensor:
        if not self.config.reads_pictures:
            words_BTD: Tensor = self.embedding(inputs)
            return words_BTD
        patches = self.patch_embedding(inputs).to(self.linear_mapper.weight.dtype)
        patches_BPD = self.linear_mapper(patches)
        class_B1D = self.class_embedding.expand(len(inputs), -1, -1).to(patches_BPD.dtype)
        return torch.cat([class_B1D, patches_BPD], dim=1)

    @torch.no_grad()
    def initialise(
        self, values: Values, *, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_
    ) -> None:
        """Give every parameter its values, and the table of positions its own.

        Args:
            assign: puts whole values into a parameter that may hold only a share of them.
        """
        self.pe.initialise()
        for name, parameter in self.named_parameters():
            assign(parameter, values(name, parameter).to(parameter.device))

    def first_values(self, seed: int) -> Values:
        """Weights with which the first loss is that of a guess: log V.

        Each parameter has a generator of its own, seeded by `seed` and its name: the values do
        not depend on which other parameters are drawn, or where.
        """

        def draw(name: str, parameter: Tensor) -> Tensor:
            # On the CPU whatever the device: every device is to get the same values.
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            if name.endswith("bias"):
                return values.zero_()
            if parameter.ndim == 1:
                return values.fill_(1.0)  # LayerNorm
            generator = torch.Generator("cpu").manual_seed(_seed_of(seed, name))
            return values.normal_(0.0, self._spread(name, parameter), generator=generator)

        return draw

    def _spread(self, name: str, parameter: Tensor) -> float:
        """Standard deviation of a matrix's first values.

        - matrices: sqrt(1 / (3 fan-in)), PyTorch's own variance; 0.021 at width 768 (GPT-2: 0.02)
        - the two that write to the residual stream: over sqrt(2 layers) (GPT-2, section 2.3)
        - the head: 0.1 / width, so that logits start near zero at any width (the width's power is
          muP's, Yang et al. 2022, table 8)
        - word vectors: 0.5 after the scaling by sqrt(width), near the sinusoids' 0.7; 0.1 where
          the head shares them, or each word would at once predict itself
        """
        width = self.config.width
        if name == "embedding.lut.weight":
            return (0.1 if self.config.tied_head else 0.5) / math.sqrt(width)
        if name == "lm_head.weight":
            return 0.1 / width
        if name == "class_embedding":
            return 0.02
        spread = math.sqrt(1 / (3 * parameter.shape[-1]))
        if name.endswith(("out_proj.weight", "fcn.3.weight")):
            return spread / math.sqrt(2 * self.config.num_layers)
        return spread


def rows_at(x_BTD: Tensor, positions_BK: Tensor) -> Tensor:
    """The rows of `x_BTD` at `positions_BK`: (B, K, D)."""
    return x_BTD.gather(1, positions_BK.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
