"""A run of this project is at most 1 % slower a step than a bare loop with the same network.

The bare loop has the network, the optimizer, the clipping and the order of the samples of the run,
and nothing else: no Lightning, callbacks, loggers, clocks or records. Losses that are equal to the
last digit prove that both do the same work.

    OMP_NUM_THREADS=2 python -m pytest -n 0 -s --whole-proof -k one_percent \\
        tests/benchmarks/test_whole_product.py
"""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.benchmarks.interleaved import WARM_UP, Arm, InterleavesSteps, check, run_interleaved
from tests.distributed.launching import RECIPES
from unitransformer.config import RunConfig
from unitransformer.data.datamodule import DataModule
from unitransformer.data.sources import Synthetic, load_source
from unitransformer.launch.devices import set_up_process
from unitransformer.objectives import Objective
from unitransformer.training.optimizer import build_optimizer
from unitransformer.transformer import Transformer

STEPS = WARM_UP + 80
ALLOWED = 0.01  # of a step
# Given, as two arms could measure different sizes at the same time, and round differently.
BLOCKS = ("--loss-chunk", "1024", "--loss-block", "2048")


def train_bare(config: RunConfig, turns: InterleavesSteps) -> list[float]:
    """Trains as a user would without this project; returns the loss of every step."""
    device = torch.device("cpu")
    set_up_process(config.parallel, "cpu")
    source = load_source(config)
    assert isinstance(source.train, Synthetic)
    source.train.draw(device)
    loader = DataModule(config, source).train_dataloader()
    network = Transformer(config.model)
    network.init_weights(network.initial_weights(config.seed))
    objective = Objective(network, loss_chunk=config.loss_chunk, loss_block=config.loss_block or 0)
    optimizer = build_optimizer(network.named_parameters(), config)
    losses = []
    turns.begin_step()
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate_at(step)
        loss = objective(source.train.fill(batch, device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        turns.end_step()
        if step + 1 < config.max_steps:
            turns.begin_step()
    return losses


def arms_of(recipe: str) -> dict[str, Arm]:
    return {
        "bare loop": Arm(recipe=recipe, train=train_bare),
        "whole product": Arm(recipe=recipe),
    }


def options_for(recipe: str, steps: int) -> list[str]:
    often = ("--max-steps", "--validate-every", "--optimizer.schedule-steps")
    options = ["--data", "synthetic", "--devices", "1", "--strategy", "single"]
    options += [text for name in often for text in (name, str(steps))]
    return options + [*(() if recipe == "vit" else BLOCKS)]


def reference_shape(recipe: str) -> list[str]:
    """Options that undo the tiny shape of tests."""
    model = RECIPES[recipe].PRESET.model_config("reference")
    shape = {item.name: getattr(model, item.name) for item in fields(model)}
    names = ["width", "num_layers", "num_heads", "feedforward_width"]
    names += ["image_size", "patch_size"] if recipe == "vit" else ["num_classes", "num_positions"]
    return [
        text for name in names for text in (f"--model.{name.replace('_', '-')}", str(shape[name]))
    ]


@pytest.mark.parametrize("recipe", ["bert", "gpt", "vit"])
def test_the_bare_loop_does_the_work_of_the_product(recipe: str, tmp_path: Path) -> None:
    taken_s = run_interleaved(tmp_path / "arms", arms_of(recipe), options_for(recipe, 6))
    assert [len(arm["wall"]) for arm in taken_s.values()] == [6, 6]


@pytest.mark.alone
@pytest.mark.proof
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("recipe", ["bert", "gpt", "vit"])
def test_the_whole_product_adds_at_most_one_percent_to_a_step(recipe: str, tmp_path: Path) -> None:
    options = [*reference_shape(recipe), *options_for(recipe, STEPS)]
    batch_size = RECIPES[recipe].PRESET.cpu.batch_size
    options += ["--batch-size", str(batch_size)]
    allowed = {"whole product": ALLOWED}
    clocks = ("processor", "wall")
    check(tmp_path, arms_of(recipe), options, batch_size, allowed, clocks=clocks)
