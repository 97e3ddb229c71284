"""The training loss of each task; the head computes logits only at predicted positions.

B batch | T positions | K predicted positions | D width | N rows with a target
V classes, and in a training step the columns that pad the logits
"""

import math
from typing import NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from unitransformer.linear_cross_entropy import IGNORED as IGNORED  # recipes and data use it too
from unitransformer.linear_cross_entropy import linear_cross_entropy
from unitransformer.transformer import Transformer


class Batch(TypedDict):
    """One micro-batch of any task."""

    inputs: Tensor  # tokens (B, T) or images (B, C, S, S)
    targets: Tensor  # next tokens (B, T), masked tokens (B, K) or labels (B,); may be IGNORED
    positions: NotRequired[Tensor]  # (B, K), BERT: positions of the masked tokens


class Score(NamedTuple):
    """Sums over the targets that count, which add up over batches and ranks."""

    loss: Tensor
    correct: Tensor
    rows: Tensor


class Objective(nn.Module):
    """The network and its loss as one module, which is compiled, sharded and trained.

    Args:
        loss_chunk: rows whose logits are in memory at once; 0: all. Loss and gradients are the same
            for every chunk size, but with chunks the whole (N, V) matrix is never in memory, so
            that a large vocabulary fits.
        loss_block: logits of a row that one matrix product computes; 0: all. It changes speed, and
            loss and gradients by rounding alone.
        num_logits: columns of the logits of a training step. Those after the classes have the
            probability 0, so loss and gradients are the same. None: as many as classes.
    """

    def __init__(
        self,
        network: Transformer,
        *,
        loss_chunk: int = 0,
        loss_block: int = 0,
        num_logits: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss_chunk = loss_chunk
        self.loss_block = loss_block
        self.num_padding = (num_logits or network.config.num_classes) - network.config.num_classes

    def forward(self, batch: Batch) -> Tensor:
        """Returns the mean cross entropy over the targets that count: nats, a float32 scalar."""
        states = self.network.states(batch["inputs"], batch.get("positions"))
        states_ND = states.reshape(-1, states.shape[-1])
        targets_N = batch["targets"].reshape(-1)
        head = self.network.lm_head
        if self.loss_chunk or self.loss_block:
            return linear_cross_entropy(
                states_ND,
                *pad_head(head.weight, head.bias, self.num_padding),
                targets_N,
                rows=self.loss_chunk,
                columns=self.loss_block,
            )
        if self.num_padding:
            logits_NV = functional.linear(
                states_ND, *pad_head(head.weight, head.bias, self.num_padding)
            )
        else:
            logits_NV = head(states_ND)
        loss = functional.cross_entropy(
            logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="sum"
        )
        return loss / (targets_N != IGNORED).sum().clamp(min=1)  # 0, not NaN, without targets

    @torch.no_grad()
    def score(self, batch: Batch) -> Score:
        """Returns the sums of loss, correct predictions and targets."""
        states = self.network.states(batch["inputs"], batch.get("positions"))
        states_ND = states.reshape(-1, states.shape[-1])
        targets_N = batch["targets"].reshape(-1)
        chunk = self.loss_chunk or len(states_ND)
        parts = zip(torch.split(states_ND, chunk), torch.split(targets_N, chunk), strict=True)
        scores = [self._score_rows(rows, targets) for rows, targets in parts]
        return Score(*(torch.stack(sums).sum() for sums in zip(*scores, strict=True)))

    def _score_rows(self, states_ND: Tensor, targets_N: Tensor) -> Score:
        logits_NV = self.network.lm_head(states_ND).float()
        loss = functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
        correct = (logits_NV.argmax(-1) == targets_N).sum()
        return Score(loss, correct, (targets_N != IGNORED).sum())


def pad_head(
    weight_VD: Tensor, bias_V: Tensor | None, num_padding: int
) -> tuple[Tensor, Tensor | None]:
    """Returns weight and bias of a head with `num_padding` more classes, whose logits are -inf.

    No target names them. Their probability is exactly 0, and so is what they add to the loss and to
    every gradient. The parameters stay as they are. cuBLAS is reported to be up to three times
    faster in eager mode if the rows of logits are multiples of 16 bytes.
    """
    if not num_padding:
        return weight_VD, bias_V
    device = weight_VD.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # Casting before padding copies half the bytes.
        weight_VD = weight_VD.to(torch.get_autocast_dtype(device))
    if bias_V is None:
        bias_V = torch.zeros_like(weight_VD[:, 0])
    return (
        functional.pad(weight_VD, (0, 0, 0, num_padding)),
        functional.pad(bias_V, (0, num_padding), value=-math.inf),
    )
