"""The cross entropy of a linear head, computed in blocks, without the whole matrix of logits.

N rows | D width | V classes, and in a training step the columns that pad the logits
R rows of a panel | C classes of a block

A panel of rows goes through the vocabulary twice. The first time it computes the logits block by
block, and of each block, while that is in the cache, the exponentials and their sum (Milakov and
Gimelshein 2018, "Online normalizer calculation for softmax"). Then the sums of all blocks give the
probabilities, and the second time each block becomes the gradient of its logits in place, and
enters the two products of the backward pass. No logits are computed twice, and memory holds (R, V)
of them. On a CPU, blocks are also faster: libraries multiply a matrix of 30,000 columns more slowly
than its parts.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of the gradients until the backward pass: those of rare classes would be zero in float16. A power
# of two, which changes no other sum.
GRADIENT_SCALE = 4096.0
IGNORED = -100  # a target that does not count, such as padding; PyTorch's default


def linear_cross_entropy(
    states_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    rows: int = 0,
    columns: int = 0,
) -> Tensor:
    """Returns the mean cross entropy over the targets that count: nats, a float32 scalar.

    The forward pass computes the gradients too. It saves (N, D) + (V, D) numbers for the backward
    pass instead of (N, V). A second backward pass through the same loss is an error.

    Args:
        rows: R, the rows whose logits are in memory at once; 0: all.
        columns: C, the logits of a row that one product computes; 0: all.

    Raises:
        ValueError: `rows` or `columns` below 0.
    """
    for name, value in (("rows", rows), ("columns", columns)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")
    num_rows, num_columns = len(states_ND), len(weight_VD)
    apply: Any = _LinearCrossEntropy.apply
    loss: Tensor = apply(
        states_ND,
        weight_VD,
        bias_V,
        targets_N,
        min(rows or num_rows, num_rows),
        min(columns or num_columns, num_columns),
    )
    return loss


class _Block(NamedTuple):
    """Logits of a panel for some of the classes, then their exponentials, then their gradients."""

    classes: slice
    values: Tensor  # (R, C), float32
    targets: Tensor  # (R, 1), indices in the block; any, if the target is in another block
    has_target: Tensor  # (R,)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        rows: int,
        columns: int,
    ) -> Tensor:
        dtype = _product_dtype(states_ND)
        x_ND, w_VD = states_ND.to(dtype), weight_VD.to(dtype)
        counts_N = targets_N != IGNORED
        count = counts_N.sum().clamp(min=1)
        loss = torch.zeros((), device=states_ND.device)
        d_states_ND = d_weight_VD = d_bias_V = None
        if any(ctx.needs_input_grad):
            d_states_ND = torch.empty_like(x_ND, dtype=torch.float32)
            d_weight_VD = torch.empty_like(w_VD, dtype=torch.float32)
            if bias_V is not None:
                d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32)
        memory = torch.empty(rows * len(w_VD), device=states_ND.device)
        for start in range(0, len(x_ND), rows):
            panel = slice(start, start + rows)
            x_RD, targets_R, counts_R = x_ND[panel], targets_N[panel], counts_N[panel]
            losses_R, factors_RB, blocks = _exponentials(
                x_RD, w_VD, bias_V, targets_R, memory, columns
            )
            loss += (losses_R * counts_R).sum()
            if d_states_ND is None or d_weight_VD is None:
                continue
            weights_R1 = (GRADIENT_SCALE * counts_R / count).unsqueeze(1)
            for block, factors_R1 in zip(
                blocks, torch.split(factors_RB * weights_R1, 1, 1), strict=True
            ):
                gradient_RC = block.values.mul_(factors_R1)
                ours_R1 = weights_R1 * block.has_target.unsqueeze(1)
                gradient_RC.scatter_add_(1, block.targets, -ours_R1)
                if d_bias_V is not None:
                    d_bias_V[block.classes] += gradient_RC.sum(0)
                gradient_RC = gradient_RC.to(dtype)
                is_first = block.classes.start == 0
                _multiply(gradient_RC, w_VD[block.classes], d_states_ND[panel], add=not is_first)
                _multiply(gradient_RC.T, x_RD, d_weight_VD[block.classes], add=start > 0)
        ctx.save_for_backward(d_states_ND, d_weight_VD, d_bias_V)
        ctx.dtypes = [None if t is None else t.dtype for t in (states_ND, weight_VD, bias_V)]
        return loss / count

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the head's gradient is large, and a copy of it would be a new piece of memory.
        gradients = [
            None if gradient is None else gradient.mul_(d_loss / GRADIENT_SCALE).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None)


def _product_dtype(states_ND: Tensor) -> torch.dtype:
    """Returns the dtype of matrix products: that of autocast where it is on."""
    device = states_ND.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states_ND.dtype


def _exponentials(
    x_RD: Tensor,
    w_VD: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    memory: Tensor,
    columns: int,
) -> tuple[Tensor, Tensor, list[_Block]]:
    """Returns the loss of each row, and its exponentials in blocks, which lie in `memory`.

    A block's exponentials times its factors, (R, number of blocks), are its probabilities.
    """
    blocks: list[_Block] = []
    maxima, sums = [], []
    target_logits_R = torch.zeros_like(targets_R, dtype=torch.float32)
    for block in _split(len(w_VD), targets_R, memory, columns):
        logits_RC = block.values
        _multiply(x_RD, w_VD[block.classes].T, logits_RC, add=False)
        if bias_V is not None:
            logits_RC += bias_V[block.classes]
        logits_R = logits_RC.gather(1, block.targets).squeeze(1)
        target_logits_R = torch.where(block.has_target, logits_R, target_logits_R)
        # Not -inf, where a block has only padding: its exponentials would be NaN.
        maximum_R1 = logits_RC.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        exponentials_RC = logits_RC.sub_(maximum_R1).exp_()
        maxima.append(maximum_R1)
        sums.append(exponentials_RC.sum(1, keepdim=True))
        blocks.append(block)
    maxima_RB, sums_RB = torch.cat(maxima, 1), torch.cat(sums, 1)
    log_sums_R1 = (maxima_RB + sums_RB.log()).logsumexp(1, keepdim=True)
    losses_R = log_sums_R1.squeeze(1) - target_logits_R
    return losses_R, (maxima_RB - log_sums_R1).exp_(), blocks


def _split(num_classes: int, targets_R: Tensor, memory: Tensor, columns: int) -> Iterator[_Block]:
    """Yields blocks of `columns` classes, one after the other in `memory`."""
    rows = len(targets_R)
    for start in range(0, num_classes, columns):
        end = min(start + columns, num_classes)
        yield _Block(
            classes=slice(start, end),
            values=memory[rows * start : rows * end].view(rows, end - start),
            targets=(targets_R - start).clamp(0, end - start - 1).unsqueeze(1),
            has_target=(targets_R >= start) & (targets_R < end),
        )


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """Stores a matrix product in `out`, or adds it; `out` is float32, the factors need not be."""
    if a.dtype != out.dtype:
        product = torch.mm(a, b)
        out.add_(product) if add else out.copy_(product)
    elif add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)
