"""Tests that recomputed layers repeat their dropout, and that nothing is saved for it without."""

import pytest
import torch

from recipes import gpt
from unitransformer.config import ActivationCheckpointing
from unitransformer.objectives import Batch, Objective
from unitransformer.parallel.activation_checkpointing import checkpoint_activations
from unitransformer.transformer import Transformer

TINY = {"width": 16, "num_layers": 2, "num_heads": 4, "feedforward_width": 32, "num_classes": 60}


def gradients(mode: ActivationCheckpointing, *, dropout: float) -> list[torch.Tensor]:
    objective = Objective(Transformer(gpt.model_config(**TINY, dropout=dropout)))
    checkpoint_activations(objective, mode)
    tokens = torch.arange(40).reshape(2, 20)
    torch.manual_seed(0)
    loss = objective(Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:]))
    return list(torch.autograd.grad(loss, tuple(objective.parameters())))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_layers_have_the_same_gradients_to_the_last_bit(
    mode: ActivationCheckpointing, dropout: float
) -> None:
    pairs = zip(gradients(mode, dropout=dropout), gradients("off", dropout=dropout), strict=True)
    assert all(torch.equal(ours, expected) for ours, expected in pairs)


@pytest.mark.parametrize(("dropout", "saved"), [(0.0, 0), (0.5, 2)])
def test_only_layers_with_dropout_save_the_state_of_the_random_numbers(
    dropout: float, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[torch.Tensor] = []
    read = torch.get_rng_state

    def count() -> torch.Tensor:
        states.append(read())
        return states[-1]

    monkeypatch.setattr(torch, "get_rng_state", count)
    objective = Objective(Transformer(gpt.model_config(**TINY, dropout=dropout)))
    checkpoint_activations(objective, "full")
    tokens = torch.zeros(2, 20, dtype=torch.long)
    objective(Batch(inputs=tokens, targets=tokens))
    assert len(states) == saved
