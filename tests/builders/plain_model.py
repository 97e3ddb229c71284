"""A plain PyTorch pre-norm transformer: the reference for parameter names, layouts and outputs."""

import math

import torch
from torch import Tensor, nn

from unitransformer.config import ModelConfig


class PlainEmbeddings(nn.Module):
    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.lut = nn.Embedding(vocab_size, width)
        self.width = width

    def forward(self, words: Tensor) -> Tensor:
        return self.lut(words) * math.sqrt(self.width)


class PlainPositions(nn.Module):
    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        position = torch.arange(positions).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * -(math.log(10_000.0) / width))
        table = torch.zeros(1, positions, width)
        table[0, :, 0::2] = torch.sin(position * rate)
        table[0, :, 1::2] = torch.cos(position * rate)
        self.register_buffer("pe", table)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, : x.size(1)]


class PlainFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fcn = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fcn(x)


class PlainLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.feedforward = PlainFeedForward(config.width, config.feedforward_width, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln1(x)
        x = x + self.mha(h, h, h, need_weights=False)[0]
        return x + self.feedforward(self.ln2(x))


class PlainTransformer(nn.Module):
    """Full attention; returns logits. Images are cut with `unfold` and read at the class token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        if config.patch_size is None:
            self.embedding = PlainEmbeddings(config.num_classes, config.width)
        else:
            self.class_embedding = nn.Parameter(torch.randn(1, 1, config.width))
            self.linear_mapper = nn.Linear(config.num_channels * config.patch_size**2, config.width)
        self.pe = PlainPositions(config.num_positions, config.width)
        self.transformer_layers = nn.Sequential(
            *(PlainLayer(config) for _ in range(config.num_layers))
        )
        self.lm_head = nn.Linear(config.width, config.num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.patch is None:
            return self.lm_head(self.transformer_layers(self.pe(self.embedding(inputs))))
        patches = nn.functional.unfold(inputs, self.patch, stride=self.patch).transpose(1, 2)
        x = self.linear_mapper(patches)
        x = torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1)
        return self.lm_head(self.transformer_layers(self.pe(x))[:, 0])
