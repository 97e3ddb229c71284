"""The training loss of each task; the head computes logits only at predicted positions.

B batch | T positions | K predicted positions | D width | N rows with a target
V classes, and in a training step the columns that pad the logits
"""

import math
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from unitransformer.transformer import Transformer

IGNORED = -100  # a target that does not count, such as padding; PyTorch's default


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
        num_logits: columns of the logits of a training step. Those after the classes have the
            probability 0, so loss and gradients are the same. None: as many as classes.
    """

    def __init__(
        self, network: Transformer, *, loss_chunk: int = 0, num_logits: int | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.loss_chunk = loss_chunk
        self.num_padding = (num_logits or network.config.num_classes) - network.config.num_classes

    def forward(self, batch: Batch) -> Tensor:
        """Returns the mean cross entropy over the targets that count: nats, a float32 scalar."""
        states = self.network.states(batch["inputs"], batch.get("positions"))
        states_ND = states.reshape(-1, states.shape[-1])
        targets_N = batch["targets"].reshape(-1)
        head = self.network.lm_head
        if self.loss_chunk:
            return chunked_cross_entropy(
                states_ND,
                *pad_head(head.weight, head.bias, self.num_padding),
                targets_N,
                chunk=self.loss_chunk,
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


def chunked_cross_entropy(
    states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, *, chunk: int
) -> Tensor:
    """Returns the mean cross entropy of a linear head, computed `chunk` rows at a time.

    The forward pass computes the gradients too, while a chunk's logits are in memory. It saves
    (N, D) + (V, D) numbers for the backward pass instead of (N, V).

    Raises:
        ValueError: `chunk` below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    apply: Any = _ChunkedCrossEntropy.apply
    loss: Tensor = apply(states_ND, weight_VD, bias_V, targets_N, chunk)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        chunk: int,
    ) -> Tensor:
        count = (targets_N != IGNORED).sum().clamp(min=1)
        loss = torch.zeros((), dtype=torch.float32, device=states_ND.device)
        needs_grad = any(ctx.needs_input_grad)
        d_states_ND = torch.empty_like(states_ND) if needs_grad else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad else None
        d_bias_V = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32) if needs_grad else None
        for start in range(0, len(states_ND), chunk):
            part = slice(start, start + chunk)
            states, targets = states_ND[part], targets_N[part]
            logits = functional.linear(states, weight_VD, bias_V).float()
            loss += functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            if d_states_ND is None or d_weight_VD is None or d_bias_V is None:
                continue
            has_target = targets != IGNORED
            d_logits = logits.softmax(-1)
            rows = torch.arange(len(targets), device=targets.device)  # avoids a copy to the device
            d_logits[rows, targets.where(has_target, 0)] -= 1
            d_logits *= (has_target.float() / count).unsqueeze(-1)
            d_bias_V += d_logits.sum(0)
            d_logits = d_logits.to(states.dtype)
            d_states_ND[part] = d_logits @ weight_VD.to(states.dtype)
            d_weight_VD += d_logits.T @ states
        ctx.save_for_backward(d_states_ND, d_weight_VD, d_bias_V)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return loss / count

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_states_ND, d_weight_VD, d_bias_V = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        d_bias = None if bias_dtype is None else (d_bias_V * d_loss).to(bias_dtype)
        return d_states_ND * d_loss, (d_weight_VD * d_loss).to(weight_dtype), d_bias, None, None
