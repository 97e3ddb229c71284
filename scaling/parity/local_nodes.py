"""Runs a recipe on several nodes that are simulated on this machine, with a torchrun for each."""

import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from scaling.recipe_process import ProcessResult, run_command
from unitransformer.config import Recipe
from unitransformer.launch.failures import BAD_USAGE, ERROR_FILE, first_failure, read_failure

ADDRESS = "127.0.0.1"
PORT = 29500  # torch's default, for printed commands; a run here takes a free port
VISIBLE = "CUDA_VISIBLE_DEVICES"


def torchrun_options(num_nodes: int, node: int | str, devices: int, port: int) -> list[str]:
    """Returns the options of torchrun for one of several nodes on this machine."""
    options = f"--nnodes {num_nodes} --node-rank {node} --nproc-per-node {devices}"
    return f"{options} --master-addr {ADDRESS} --master-port {port}".split()


def run_on_nodes(
    recipe: Recipe,
    arguments: Sequence[str],
    *,
    accelerator: str,
    devices: int,
    num_nodes: int,
    log: Path,
    limit_s: float,
) -> ProcessResult:
    """Runs a recipe to its end; returns the result of the first node that failed, or of node 0.

    Args:
        devices: per node.
        log: file for the output of all nodes, with the first failure as its last line.
    """
    with socket.create_server((ADDRESS, 0)) as probe:
        port = int(probe.getsockname()[1])  # free
    logs = [log.with_name(f"{log.name}-{node}") for node in range(num_nodes)]
    failures = [log.with_name(f"{node}.failure") for node in range(num_nodes)]

    def run(node: int) -> ProcessResult:
        torchrun = ["torch.distributed.run", *torchrun_options(num_nodes, node, devices, port)]
        return run_command(
            [sys.executable, "-m", *torchrun, "-m", f"recipes.{recipe}", *arguments],
            log=logs[node],
            limit_s=limit_s,
            # torchrun copies the failure of the first failed rank into this file.
            variables={ERROR_FILE: str(failures[node]), **_devices_of(node, devices, accelerator)},
        )

    with ThreadPoolExecutor() as pool:
        others = [pool.submit(run, node) for node in range(1, num_nodes)]
        ends = [run(0), *(other.result() for other in others)]
    output = "".join(path.read_text(errors="replace") for path in logs)
    ended = next((ended for ended in ends if ended.exit_code != 0), ends[0])
    recorded = [failure for path in failures if (failure := read_failure(path, 0)) is not None]
    if recorded and ended.exit_code is not None:
        failure = first_failure(recorded)
        output += f"error: {failure.message}\n"
        # torchrun exits with 1, whatever the exit code of its ranks.
        ended = replace(ended, exit_code=BAD_USAGE if failure.is_bad_usage else 1)
    log.write_text(output)
    return replace(ended, elapsed_s=max(each.elapsed_s for each in ends))


def _devices_of(node: int, devices: int, accelerator: str) -> dict[str, str]:
    """Returns the variable that gives a node its share of this machine's GPUs."""
    if accelerator == "cpu":
        return {}
    visible = os.environ.get(VISIBLE)
    first, end = node * devices, (node + 1) * devices
    gpus = range(first, end) if visible is None else visible.split(",")[first:end]
    return {VISIBLE: ",".join(map(str, gpus))}
