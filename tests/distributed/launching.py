"""Trains tiny recipes for tests: `train` in forked ranks, `begin` as a forked command.

`recipe_command` gives the command line that a person would type.
"""

import functools
import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from recipes import bert, gpt, vit
from recipes.command_line import run_recipe
from tests.distributed.forking import begin_fork, fork_command, fork_ranks
from tests.processes import PATIENCE_S

RECIPES: dict[str, Any] = {"bert": bert, "gpt": gpt, "vit": vit}
TINY = [
    *("--model.width", "16", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.feedforward-width", "32", "--dropout", "0", "--max-steps", "6"),
    *("--validate-every", "6", "--validation-batches", "1", "--accelerator", "cpu"),
    *("--ceiling-s", "0"),
]
TEXT = ["--model.num-classes", "300", "--model.num-positions", "16"]
IMAGES = ["--model.image-size", "16", "--model.patch-size", "8"]


def recipe_arguments(recipe: str, folder: Path, *options: str) -> list[str]:
    """Options that train a tiny model; the last value of an option wins."""
    data = folder.parent / "text.txt"
    data.write_text("".join(f"{a} times {b} makes {a * b}\n" for a in range(60) for b in range(20)))
    shape = IMAGES if recipe == "vit" else [*TEXT, "--data", str(data)]
    places = ["--out", str(folder), "--record", str(folder / "record.json")]
    return [*TINY, *shape, *places, *options]


def recipe_command(recipe: str, folder: Path, *options: str) -> list[str]:
    """The command line of `recipe_arguments`."""
    return [sys.executable, "-m", f"recipes.{recipe}", *recipe_arguments(recipe, folder, *options)]


def environment(folder: Path) -> dict[str, str]:
    """The environment of this process with a cache in `folder`."""
    return {**os.environ, "UNITRANSFORMER_CACHE": str(folder / "cache")}


def load(folder: Path) -> dict[str, Any]:
    """The record of the run in `folder`."""
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record


def begin(
    recipe: str,
    folder: Path,
    *options: str,
    fault: Callable[[], None] | None = None,
    variables: Mapping[str, str] | None = None,
    is_whole: bool = False,
) -> BaseProcess:
    """Runs a recipe command in a fork of this process; its output goes to `output.log`.

    Args:
        is_whole: whether the run counts tensor bytes and shows results at its end.
        fault: called first in the fork, to inject a fault into every rank.
        variables: environment variables of a launcher.
    """
    arguments = recipe_arguments(recipe, folder, *options)
    folder.mkdir(parents=True, exist_ok=True)
    shared = environment(folder.parent)
    shared |= variables or {}
    module = RECIPES[recipe]

    def command() -> int:
        if fault is not None:
            fault()
        return run_recipe(module.PRESET, module.show, arguments)

    return fork_command(command, log=folder / "output.log", variables=shared, is_whole=is_whole)


def train(recipe: str, folder: Path, *options: str, is_whole: bool = False) -> dict[str, Any]:
    """Trains a tiny recipe in as many forked ranks as `--devices` and `--num-nodes` say; returns
    the record.

    Args:
        is_whole: whether the run counts tensor bytes and shows results at its end.
    """
    arguments = recipe_arguments(recipe, folder, *options)
    num_nodes = _count(arguments, "--num-nodes")
    world_size = _count(arguments, "--devices") * num_nodes
    folder.mkdir(parents=True, exist_ok=True)
    run = (recipe, arguments, folder, is_whole)
    fork_ranks(_be_rank, *run, world_size=world_size, num_nodes=num_nodes)
    return load(folder)


def _count(arguments: Sequence[str], flag: str) -> int:
    """The last value of an option, or 1."""
    values = [value for word, value in itertools.pairwise(arguments) if word == flag]
    return int(values[-1]) if values else 1


def _be_rank(
    variables: Mapping[str, str], recipe: str, arguments: list[str], folder: Path, is_whole: bool
) -> None:
    begin_fork(environment(folder.parent) | variables, is_whole=is_whole)
    rank = variables.get("RANK", "0")
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


def wait_for_text(path: Path, text: str) -> None:
    """Waits until a command has written `text` to its log."""
    deadline = time.monotonic() + PATIENCE_S
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, f"{path} never said {text!r}"
        time.sleep(0.05)


def wait_for_ranks(process: BaseProcess, count: int) -> list[psutil.Process]:
    """Waits until a command has started its ranks; returns them by rank."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        ranks = psutil.Process(process.pid).children()
        if len(ranks) == count:
            return sorted(ranks, key=lambda rank: rank.pid)
        time.sleep(0.02)
    raise AssertionError("no ranks were started")


def fork_torchrun(
    command: Sequence[str], *, log: Path, variables: Mapping[str, str]
) -> BaseProcess:
    """Runs a torchrun command line in a fork; its ranks are forks too, not new interpreters.

    Args:
        command: the arguments of torchrun: its options, `-m`, a recipe, and the recipe's options.
    """

    def launch() -> int:
        parsed = torch.distributed.run.parse_args(command)
        config, _, _ = torch.distributed.run.config_from_args(parsed)
        config.start_method = "fork"
        module = RECIPES[parsed.training_script.removeprefix("recipes.")]
        elastic_launch(config, _be_torchrun_rank)(module, parsed.training_script_args)
        return 0

    return fork_command(launch, log=log, variables=variables)


def _be_torchrun_rank(module: Any, arguments: Sequence[str]) -> None:
    begin_fork({})
    if code := run_recipe(module.PRESET, module.show, arguments):
        raise SystemExit(code)


def torchrun_two_ranks(
    place: Path,
    entry: Callable[..., Any] | str,
    *arguments: Any,
    num_nodes: int,
    backend: str = "static",
    timeout_s: float = PATIENCE_S,
    **options: Any,
) -> tuple[list[int | None], list[Path]]:
    """Starts two ranks by a forked torchrun per node; returns the exit codes and logs of these."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def launch(node: int) -> int:
        torchrun = LaunchConfig(
            *(num_nodes, num_nodes, 2 // num_nodes),
            run_id=str(place),
            rdzv_endpoint=f"127.0.0.1:{port}",
            rdzv_backend=backend,
            rdzv_configs={"rank": node} if backend == "static" else {},
            logs_specs=DefaultLogsSpecs(log_dir=str(place / f"logs-{node}")),
            local_addr="127.0.0.1",
            **options,
        )
        elastic_launch(torchrun, entry)(*arguments)
        return 0

    logs = [place / f"node-{node}.log" for node in range(num_nodes)]
    nodes = [
        fork_command(functools.partial(launch, node), log=log, variables=environment(place))
        for node, log in enumerate(logs)
    ]
    for process in nodes:
        process.join(timeout_s)
    return [process.exitcode for process in nodes], logs
