"""The network: tokens or images in, logits out. BERT, GPT and ViT are three configs of it.

B batch | T positions | K selected positions | D width | H heads | W width of one head | V classes
P patches | C image channels | S pixels along each side of an image

Parameters have the names and layouts of the plain pre-norm model made of `nn.Embedding`,
`nn.MultiheadAttention(batch_first=True)`, `nn.LayerNorm` and `nn.Sequential(Linear, ReLU, Dropout,
Linear)`, so a state dict of one model loads into the other.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from unitransformer.config import ModelConfig

# Returns the initial value of a whole parameter, given its name and a tensor of its shape.
InitialWeights = Callable[[str, Tensor], Tensor]


class Linear(nn.Linear):
    """`nn.Linear` without initialization: `Transformer.init_weights` sets every weight once."""

    def reset_parameters(self) -> None:
        """Leaves the memory as it is."""


class Embedding(nn.Embedding):
    """`nn.Embedding` without initialization."""

    def reset_parameters(self) -> None:
        """Leaves the memory as it is."""


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` without initialization."""

    def reset_parameters(self) -> None:
        """Leaves the memory as it is."""


class Embeddings(nn.Module):
    """Token embeddings, scaled by the square root of the width (Vaswani et al. 2017, 3.4)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.lut = Embedding(vocab_size, width)
        self.scale = math.sqrt(width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD: Tensor = self.lut(tokens_BT)
        return x_BTD * self.scale


class PatchEncoding(nn.Module):
    """Cuts images into square patches: (B, C, S, S) -> (B, P, C * patch_size**2).

    Patches run along rows, then columns; each is flattened as (channel, height, width).
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.flatten = nn.Flatten(start_dim=2)

    def forward(self, images_BCSS: Tensor) -> Tensor:
        size = self.patch_size
        grid = images_BCSS.unfold(2, size, size).unfold(3, size, size)
        patches = grid.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        flat: Tensor = self.flatten(patches)
        return flat


class PositionalEncoding(nn.Module):
    """Adds sinusoids of the position (Vaswani et al. 2017, 3.5); it has no parameters."""

    pe: Tensor

    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pe", torch.empty(1, num_positions, width))

    @torch.no_grad()
    def init_weights(self) -> None:
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
    """Self-attention with the parameter layout of `nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x_BTD: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        """Attends from `positions_BK`, or from all positions, to all positions."""
        if positions_BK is None:
            qkv = functional.linear(x_BTD, self.in_proj_weight, self.in_proj_bias)
            q, k, v = qkv.chunk(3, dim=-1)
            mask = None
        else:
            width = x_BTD.shape[-1]
            q = functional.linear(
                gather_positions(x_BTD, positions_BK),
                self.in_proj_weight[:width],
                self.in_proj_bias[:width],
            )
            kv = functional.linear(x_BTD, self.in_proj_weight[width:], self.in_proj_bias[width:])
            k, v = kv.chunk(2, dim=-1)
            mask = self._causal_mask(positions_BK, x_BTD.shape[1])
        mixed_BHTW = functional.scaled_dot_product_attention(
            self._split_heads(q),
            self._split_heads(k),
            self._split_heads(v),
            attn_mask=mask,
            is_causal=self.causal and mask is None,
        )
        out: Tensor = self.out_proj(mixed_BHTW.transpose(1, 2).flatten(2))
        return out

    def _split_heads(self, x_BTD: Tensor) -> Tensor:
        batch, positions, width = x_BTD.shape
        shape = (batch, positions, self.num_heads, width // self.num_heads)
        return x_BTD.view(shape).transpose(1, 2)

    def _causal_mask(self, positions_BK: Tensor, num_positions: int) -> Tensor | None:
        if not self.causal:
            return None
        keys_T = torch.arange(num_positions, device=positions_BK.device)
        return (keys_T <= positions_BK.unsqueeze(-1)).unsqueeze(1)  # (B, 1, K, T)


class PositionwiseFeedForward(nn.Module):
    """Linear, activation, dropout, linear, applied to each position separately."""

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
        """Returns (B, T, D), or (B, K, D) of `positions_BK` alone."""
        attended = self.mha(self.ln1(x_BTD), positions_BK)
        if positions_BK is not None:
            x_BTD = gather_positions(x_BTD, positions_BK)
        x_BTD = x_BTD + attended
        out: Tensor = x_BTD + self.feedforward(self.ln2(x_BTD))
        return out


class Transformer(nn.Module):
    """The whole network. The config says what it reads and how it attends.

    The initial weights depend only on `config` and `seed`. Built under `torch.device("meta")`, the
    network has shapes but allocates no memory.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # memory is allocated once, for the whole network
            self._build(config)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(self.initial_weights(seed))

    def _build(self, config: ModelConfig) -> None:
        if config.image_size is None or config.patch_size is None:
            self.embedding = Embeddings(config.num_classes, config.width)
        else:
            patch_pixels = config.num_channels * config.patch_size**2
            self.class_embedding = nn.Parameter(torch.empty(1, 1, config.width))
            self.patch_embedding = PatchEncoding(config.patch_size)
            self.linear_mapper = Linear(patch_pixels, config.width)
        self.pe = PositionalEncoding(config.num_positions, config.width)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.transformer_layers = nn.Sequential(
            *(TransformerLayer(config) for _ in range(config.num_layers))
        )
        if config.final_norm:
            self.final_norm = LayerNorm(config.width)
        self.lm_head = Linear(config.width, config.num_classes, bias=config.head_bias)
        self.softmax = nn.Softmax(dim=-1)
        self._tie_head()

    def _tie_head(self) -> None:
        if self.config.tied_head:
            self.lm_head.weight = self.embedding.lut.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie_head()  # `to_empty` splits a parameter that two modules share into two
        return self

    def forward(self, inputs: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        """Returns logits: (B, T, V), or (B, K, V) of `positions_BK` alone; of images (B, V).

        Args:
            inputs: tokens (B, T), integers, or images (B, C, S, S).
            positions_BK: the last layer and the head compute these positions alone.
        """
        logits: Tensor = self.lm_head(self.states(inputs, positions_BK))
        return logits

    def states(self, inputs: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        """Returns the head's input: (B, T, D) or (B, K, D); of images the class token's, (B, D)."""
        x_BTD: Tensor = self.embedding_dropout(self.pe(self._embed(inputs)))
        if self.config.reads_images:
            assert positions_BK is None, "an image is classified at its class token"
            positions_BK = torch.zeros(len(inputs), 1, dtype=torch.long, device=inputs.device)
        *layers, last_layer = self.transformer_layers
        for layer in layers:
            x_BTD = layer(x_BTD)
        x_BTD = last_layer(x_BTD, positions_BK)
        if self.config.final_norm:
            x_BTD = self.final_norm(x_BTD)
        return x_BTD[:, 0] if self.config.reads_images else x_BTD

    def _embed(self, inputs: Tensor) -> Tensor:
        if not self.config.reads_images:
            x_BTD: Tensor = self.embedding(inputs)
            return x_BTD
        patches = self.patch_embedding(inputs).to(self.linear_mapper.weight.dtype)
        patches_BPD = self.linear_mapper(patches)
        class_B1D = self.class_embedding.expand(len(inputs), -1, -1).to(patches_BPD.dtype)
        return torch.cat([class_B1D, patches_BPD], dim=1)

    @torch.no_grad()
    def init_weights(
        self, weights: InitialWeights, *, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_
    ) -> None:
        """Sets every parameter and the table of positions.

        Args:
            assign: copies a whole value into a parameter, of which this rank may hold only a shard.
        """
        self.pe.init_weights()
        for name, parameter in self.named_parameters():
            assign(parameter, weights(name, parameter).to(parameter.device))

    def initial_weights(self, seed: int) -> InitialWeights:
        """Returns random weights with which the first loss is that of a uniform guess, log V.

        Each parameter has its own generator, seeded by `seed` and its name. A value therefore
        depends neither on the other parameters nor on the device.
        """

        def sample(name: str, parameter: Tensor) -> Tensor:
            # Sampled on the CPU, so that every device gets the same values.
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            if name.endswith("bias"):
                return values.zero_()
            if parameter.ndim == 1:
                return values.fill_(1.0)  # LayerNorm
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            parameter_seed = int.from_bytes(digest[:8], "little") >> 1
            generator = torch.Generator("cpu").manual_seed(parameter_seed)
            return values.normal_(0.0, self._initial_std(name, parameter), generator=generator)

        return sample

    def _initial_std(self, name: str, matrix: Tensor) -> float:
        """Returns the standard deviation of a matrix's initial weights.

        - matrices: sqrt(1 / (3 fan-in)), PyTorch's variance; 0.021 at width 768 (GPT-2: 0.02)
        - the two that write to the residual stream: divided by sqrt(2 layers) (GPT-2, section 2.3)
        - the head: 0.1 / width, so that logits start near zero at any width (the power of the
          width is muP's, Yang et al. 2022, table 8)
        - token embeddings: 0.5 after the scaling by sqrt(width), near the sinusoids' 0.7; 0.1 if
          the head shares them, as otherwise each token would predict itself from the start
        """
        width = self.config.width
        if name == "embedding.lut.weight":
            return (0.1 if self.config.tied_head else 0.5) / math.sqrt(width)
        if name == "lm_head.weight":
            return 0.1 / width
        if name == "class_embedding":
            return 0.02
        std = math.sqrt(1 / (3 * matrix.shape[-1]))
        if name.endswith(("out_proj.weight", "fcn.3.weight")):
            return std / math.sqrt(2 * self.config.num_layers)
        return std


def gather_positions(x_BTD: Tensor, positions_BK: Tensor) -> Tensor:
    """Returns the rows of `x_BTD` at `positions_BK`: (B, K, D)."""
    return x_BTD.gather(1, positions_BK.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))
