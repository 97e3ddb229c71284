"""Ranks for tests. `train` forks them from this process, which has imported everything already;
`recipe_command` is for starting them as a person does.
"""

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Compilers that are forked beside threads would wait for them for ever.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import tensorboard.summary  # noqa: F401  (imported once here, not once in every rank)
import torch._inductor.compile_fx
import torch.multiprocessing
import torch.utils.tensorboard

import unitransformer.figures
import unitransformer.predictions
import unitransformer.run  # noqa: F401
from recipes import bert, gpt, vit
from recipes.command_line import run_recipe
from unitransformer.zero import load_deepspeed

load_deepspeed("cpu")
RECIPES = {"bert": bert, "gpt": gpt, "vit": vit}
TINY = [
    *("--model.width", "16", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.feedforward-width", "32", "--dropout", "0", "--max-steps", "6"),
    *("--validate-every", "6", "--validation-batches", "1", "--accelerator", "cpu"),
    *("--ceiling-s", "0"),
]
TEXT = ["--model.num-classes", "300", "--model.num-positions", "16"]
PICTURES = ["--model.image-size", "16", "--model.patch-size", "8"]


def recipe_arguments(recipe: str, folder: Path, *options: str) -> list[str]:
    """Options that train a tiny model; the last of a name wins."""
    data = folder.parent / "text.txt"
    data.write_text("".join(f"{a} times {b} makes {a * b}\n" for a in range(60) for b in range(20)))
    shape = PICTURES if recipe == "vit" else [*TEXT, "--data", str(data)]
    places = ["--out", str(folder), "--record", str(folder / "record.json")]
    return [*TINY, *shape, *places, *options]


def recipe_command(recipe: str, folder: Path, *options: str) -> list[str]:
    """The same as a command line."""
    return [sys.executable, "-m", f"recipes.{recipe}", *recipe_arguments(recipe, folder, *options)]


def environment(folder: Path) -> dict[str, str]:
    """The variables of this process, and a cache in `folder`."""
    return {**os.environ, "UNITRANSFORMER_CACHE": str(folder / "cache")}


def load(folder: Path) -> dict[str, Any]:
    """The record of the run in `folder`."""
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def begin(
    recipe: str,
    folder: Path,
    *options: str,
    fault: Callable[[], None] | None = None,
    variables: Mapping[str, str] | None = None,
) -> BaseProcess:
    """What the command line does, in a fork of this process; its output goes to `output.log`.

    Args:
        fault: called there before anything else, to plant a fault in every rank.
        variables: of a launcher.
    """
    arguments = recipe_arguments(recipe, folder, *options)
    folder.mkdir(parents=True, exist_ok=True)
    shared = environment(folder.parent)
    shared |= variables or {}
    process = torch.multiprocessing.get_context("fork").Process(
        target=_run_command, args=(recipe, arguments, shared, folder, fault)
    )
    process.start()
    return process


def _run_command(
    recipe: str,
    arguments: list[str],
    shared: dict[str, str],
    folder: Path,
    fault: Callable[[], None] | None,
) -> None:
    os.environ |= shared
    log = (folder / "output.log").open("w", buffering=1)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout = sys.stderr = log
    if fault is not None:
        fault()
    module = RECIPES[recipe]
    sys.exit(run_recipe(module.PRESET, module.show, arguments))


def train(recipe: str, folder: Path, *options: str) -> dict[str, Any]:
    """Train a tiny recipe over as many forked ranks as `--devices` says; returns the record."""
    arguments = recipe_arguments(recipe, folder, *options)
    places = [index for index, word in enumerate(arguments) if word == "--devices"]
    world_size = int(arguments[places[-1] + 1]) if places else 1
    folder.mkdir(parents=True, exist_ok=True)
    shared = environment(folder.parent)
    if world_size > 1:
        shared |= {
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "GROUP_RANK": "0",
        }
    torch.multiprocessing.start_processes(
        _run_rank, args=(recipe, arguments, shared, folder), nprocs=world_size, start_method="fork"
    )
    return load(folder)


def _run_rank(
    rank: int, recipe: str, arguments: list[str], shared: dict[str, str], folder: Path
) -> None:
    os.environ |= shared
    if "WORLD_SIZE" in shared:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    log = (folder / f"rank-{rank}.log").open("w")
    sys.stdout = sys.stderr = log
    module = RECIPES[recipe]
    try:
        code = run_recipe(module.PRESET, module.show, arguments)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        log.flush()
    if code:
        raise SystemExit(f"rank {rank} ended with {code}: {Path(log.name).read_text()[-2000:]}")
