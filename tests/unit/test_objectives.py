"""Tests the losses: ignored targets, and that chunks change nothing."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from recipes import bert, gpt
from unitransformer.costs.flops import count_parameters
from unitransformer.objectives import IGNORED, Batch, Objective, pad_head
from unitransformer.transformer import Transformer

TINY = {"width": 16, "num_layers": 2, "num_heads": 4, "feedforward_width": 32, "num_classes": 60}


def test_a_chunked_loss_never_holds_the_whole_matrix() -> None:
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    config = gpt.model_config(**{**TINY, "num_classes": 5000}, dropout=0.0)
    objective = Objective(Transformer(config), loss_chunk=8)
    tokens = torch.zeros(4, 61, dtype=torch.long)
    with Sizes():
        objective(Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:])).backward()
    assert largest <= 5000 * 16  # the head itself; logits of all rows are 5000 x 240
    largest = 0
    with Sizes():
        objective.score(Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:]))
    assert largest <= 5000 * 16


def test_a_batch_without_targets_has_zero_loss() -> None:
    objective = Objective(Transformer(gpt.model_config(**TINY)))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert objective(Batch(inputs=tokens, targets=tokens + IGNORED)).item() == 0


@pytest.mark.parametrize("tied", [True, False])
def test_training_in_blocks_gives_every_parameter_the_same_gradient(tied: bool) -> None:
    config = gpt.model_config(**TINY, tied_head=tied, head_bias=not tied, dropout=0.0)
    tokens = torch.randint(60, (3, 11))
    batch = Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:])
    gradients = []
    for blocks in ({}, {"loss_chunk": 7}, {"loss_block": 13}, {"loss_chunk": 8, "loss_block": 20}):
        objective = Objective(Transformer(config), **blocks)
        objective(batch).backward()
        gradients.append([p.grad for p in objective.parameters()])
    for whole, *others in zip(*gradients, strict=True):
        for parts in others:
            torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_padded_vocabulary_changes_neither_loss_nor_gradients(
    precision: torch.dtype, tied: bool, chunk: int
) -> None:
    config = gpt.model_config(**TINY, tied_head=tied, head_bias=not tied, dropout=0.0)
    tokens = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(0))
    batch = Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:].clone())
    batch["targets"][0, :4] = IGNORED
    results = []
    for num_logits in (None, 64):
        objective = Objective(Transformer(config), loss_chunk=chunk, num_logits=num_logits)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = objective(batch)
        loss.backward()
        results.append([loss, *(p.grad for p in objective.parameters())])
        assert sum(p.numel() for p in objective.parameters()) == count_parameters(config)
    # Gradients of chunks are rounded to bf16 once more if the head is padded.
    bounds = {"atol": 1e-4, "rtol": 0.02} if precision == torch.bfloat16 else {}
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, **bounds)


def test_padding_of_the_vocabulary_has_no_probability() -> None:
    head = Transformer(gpt.model_config(**TINY, tied_head=True, head_bias=False)).lm_head
    weight, bias = pad_head(head.weight, None, 4)
    assert weight.shape == (64, 16)
    assert bias is not None
    logits = functional.linear(torch.randn(5, 16), weight, bias)
    assert (logits.softmax(-1)[:, 60:] == 0).all()
    assert logits[:, :60].isfinite().all()


def test_padding_never_counts() -> None:
    objective = Objective(Transformer(bert.model_config(**TINY, dropout=0.0)))
    inputs = torch.randint(60, (2, 8))
    positions = torch.tensor([[1, 4, 6], [2, 3, 5]])
    targets = torch.tensor([[7, 8, IGNORED], [9, IGNORED, IGNORED]])
    loss = objective(Batch(inputs=inputs, targets=targets, positions=positions))
    logits = objective.network(inputs)
    alone = torch.stack([logits[0, 1], logits[0, 4], logits[1, 2]])
    expected = functional.cross_entropy(alone, torch.tensor([7, 8, 9]))
    torch.testing.assert_close(loss, expected)
    assert (
        int(objective.score(Batch(inputs=inputs, targets=targets, positions=positions)).rows) == 3
    )


def test_the_loss_takes_logits_without_a_softmax() -> None:
    """A second softmax would bound the loss from below by log V - 1."""
    config = gpt.model_config(**TINY, dropout=0.0)
    objective = Objective(Transformer(config))
    tokens = torch.zeros(4, 9, dtype=torch.long)
    batch = Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:])
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_a_score_adds_up_loss_right_answers_and_rows() -> None:
    objective = Objective(Transformer(gpt.model_config(**TINY))).eval()
    tokens = torch.randint(60, (2, 6))
    batch = Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:])
    score = objective.score(batch)
    torch.testing.assert_close(score.loss / score.rows, objective(batch))
    right = objective.network(batch["inputs"]).argmax(-1) == batch["targets"]
    assert int(score.correct) == int(right.sum())


def test_twenty_steps_in_blocks_have_the_losses_of_whole_logits() -> None:
    config = gpt.model_config(**TINY, dropout=0.0)
    tokens = torch.randint(60, (20, 3, 11), generator=torch.Generator().manual_seed(0))
    curves = []
    for blocks in ({}, {"loss_chunk": 8, "loss_block": 13}):
        objective = Objective(Transformer(config), **blocks)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
        losses = []
        for step in tokens:
            optimizer.zero_grad()
            loss = objective(Batch(inputs=step[:, :-1], targets=step[:, 1:]))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(*curves, rtol=1e-5, atol=0)
