"""Tests that each peer has the shape of this network, and plain ones its losses."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.builders.records import make_config
from unitransformer.config import ModelConfig, Recipe, RunConfig
from unitransformer.objectives import Batch, Objective
from unitransformer.peers.build import build_peer, peer_batch
from unitransformer.peers.catalog import PEERS, Peer, peers_of
from unitransformer.transformer import Transformer

RECIPES: tuple[Recipe, ...] = ("gpt", "bert", "vit")
CASES = [(r, p, form) for r in RECIPES for p in peers_of(r) for form in p.forms_for(r)]


def config_of(recipe: Recipe) -> RunConfig:
    model = ModelConfig(
        width=16,
        num_layers=2,
        num_heads=2,
        feedforward_width=24,
        num_classes=50 if recipe != "vit" else 3,
        num_positions=9 if recipe != "vit" else 5,
        causal=recipe == "gpt",
        image_size=8 if recipe == "vit" else None,
        patch_size=4 if recipe == "vit" else None,
    )
    return replace(make_config(recipe), model=model, batch_size=3)


def batch_of(config: RunConfig) -> Batch:
    generator = torch.Generator().manual_seed(0)
    classes = config.model.num_classes
    if config.recipe == "vit":
        images = torch.randn(3, 3, 8, 8, generator=generator)
        return {"inputs": images, "targets": torch.tensor([0, 2, 1])}
    tokens = torch.randint(classes, (3, 10), generator=generator)
    if config.recipe == "gpt":
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:].contiguous()}
    inputs, positions = tokens[:, :-1], torch.tensor([[0, 4], [8, 1], [2, 3]])
    return {"inputs": inputs, "targets": inputs.gather(1, positions), "positions": positions}


@pytest.mark.parametrize(("recipe", "peer", "form"), CASES, ids=lambda value: str(value)[:60])
def test_a_peer_trains_a_network_of_our_shape(recipe: Recipe, peer: Peer, form: str) -> None:
    if peer.package is not None and importlib.util.find_spec(peer.package) is None:
        pytest.skip(f"{peer.package} is not installed: pip install 'unitransformer[peers]'")
    config = config_of(recipe)
    batch = peer_batch(batch_of(config))
    objective = build_peer(peer.name, form, config)
    objective.train()
    loss = objective(batch)
    loss.backward()
    assert all(p.grad is not None for p in objective.parameters() if p.ndim >= 2)
    # An untrained network guesses: log of the number of classes, within what its weights add.
    uniform = torch.tensor(float(config.model.num_classes)).log()
    assert abs(float(loss.detach()) - float(uniform)) < 0.5
    ours = Objective(Transformer(config.model, seed=config.seed))
    if peer.differs is None:
        torch.testing.assert_close(loss, ours(batch_of(config)), rtol=1e-5, atol=0)
    else:
        assert loss == objective(batch)  # no dropout
    matrices = [p.numel() for p in objective.parameters() if p.ndim >= 2]
    expected = sum(p.numel() for p in ours.parameters() if p.ndim >= 2)
    extra = config.model.width * (config.model.num_positions + config.model.width + 2)
    if peer.name == "modernbert":  # its feed-forward has a third matrix
        extra += config.model.num_layers * config.model.width * config.model.feedforward_width
    assert expected - extra <= sum(matrices) <= expected + extra


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["plain", "nanogpt"])
def test_plain_networks_take_every_text_shape(name: Any, tied: bool) -> None:
    config = config_of("gpt")
    model = replace(
        config.model, activation="gelu", final_norm=True, tied_head=tied, head_bias=not tied
    )
    config = replace(config, model=model)
    batch = batch_of(config)
    loss = build_peer(name, "", config)(peer_batch(batch))
    ours = Objective(Transformer(model, seed=config.seed))(batch)
    torch.testing.assert_close(loss, ours, rtol=1e-5, atol=0)


def test_every_peer_is_under_its_name() -> None:
    assert {name: peer.name for name, peer in PEERS.items()} == {name: name for name in PEERS}
