"""Sharded training is the training of one process, whatever is divided and resumed where."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import environment, free_port, load, recipe_command, train


@pytest.mark.parametrize("recipe", ["bert", "gpt", "vit"])
def test_two_sharded_ranks_train_the_model_that_one_trains(recipe: str, tmp_path: Path) -> None:
    one = train(recipe, tmp_path / "one", "--batch-size", "8")
    two = train(recipe, tmp_path / "two", *TWO)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["validation"]["loss"] == pytest.approx(one["validation"]["loss"], rel=1e-5)
    assert two["summary"] == one["summary"]


TWO = ("--batch-size", "4", "--devices", "2", "--strategy", "fsdp")


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (("--compile", "default"), 1e-5),
        (("--loss-chunk", "7"), 1e-5),
        (("--accumulate", "2", "--batch-size", "2"), 1e-5),
        (("--precision", "bf16-mixed"), 1e-2),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_sharding_keeps_the_loss_with(
    options: tuple[str, ...], tolerance: float, tmp_path: Path
) -> None:
    one = train("gpt", tmp_path / "one", "--batch-size", "8")
    two = train("gpt", tmp_path / "two", *TWO, *options)
    assert two["loss"] == pytest.approx(one["loss"], rel=tolerance)


def test_a_run_goes_on_under_another_strategy_and_device_count(tmp_path: Path) -> None:
    whole = train("gpt", tmp_path / "whole", "--batch-size", "8")
    checkpoints = ("--checkpoint-dir", str(tmp_path / "checkpoints"))
    legs: list[tuple[str, ...]] = [
        ("--max-steps", "2", *TWO),
        ("--max-steps", "4", "--batch-size", "8", "--resume"),
        ("--max-steps", "5", "--batch-size", "4", "--devices", "2", "--resume"),
        ("--max-steps", "6", *TWO, "--resume"),
    ]
    record: dict[str, Any] = {}
    for number, leg in enumerate(legs):
        record = train("gpt", tmp_path / str(number), *leg, *checkpoints)
    assert record["launches"] == [0, 2, 4, 5]
    assert record["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_two_nodes_replicate_what_each_divides(tmp_path: Path, repository: Path) -> None:
    one = train("gpt", tmp_path / "one", "--batch-size", "8")
    port = str(free_port())
    options = ("--batch-size", "2", "--devices", "2", "--num-nodes", "2", "--strategy", "hsdp")
    nodes = [
        subprocess.Popen(
            recipe_command("gpt", tmp_path / "two", *options),
            cwd=repository,
            env={
                **environment(tmp_path),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "NODE_RANK": str(node),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    two = load(tmp_path / "two")
    assert two["world_size"] == 4
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_rank_of_a_sharded_run_holds_half_of_the_weights(
    tmp_path: Path, repository: Path
) -> None:
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["equal", "0.5"], done.stderr


SHARES = """
import unitransformer
import torch
import torch.distributed as dist
from recipes import gpt
from unitransformer.config import ParallelConfig
from unitransformer.objectives import Objective
from unitransformer.strategies import gather_network, shard
from unitransformer.transformer import Transformer

dist.init_process_group("gloo")
model = gpt.model_config(width=32, num_layers=3, num_heads=2, feedforward_width=64, num_classes=100)
with torch.device("meta"):
    objective = Objective(Transformer(model))
parallel = ParallelConfig(devices=2, strategy="fsdp", accelerator="cpu")
shard(objective, parallel, torch.device("cpu"), seed=5)
own = sum(p.to_local().numel() for p in objective.parameters())
whole = gather_network(objective.network, torch.device("cpu"))
plain = Transformer(model, seed=5).state_dict()
same = all(torch.equal(plain[name], value) for name, value in whole.state_dict().items())
if dist.get_rank() == 0:
    total = sum(value.numel() for name, value in plain.items() if name != "pe.pe")
    print("equal" if same else "different", round(own / total, 3))
dist.destroy_process_group()
"""
