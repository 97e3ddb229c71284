"""Builds the recipe's command line for a parity case, and runs it on several simulated nodes.

Each node is a torchrun on this machine.
"""

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from scaling.parity.cases import Case
from scaling.recipe_process import ProcessResult, run_command
from unitransformer.config import Recipe
from unitransformer.launch.failures import BAD_USAGE, ERROR_FILE, first_failure, read_failure

# A model that trains in seconds and has every part: attention, norms, biases, embeddings. Its
# activation is smooth, because rounding can open a ReLU at zero: one of some 20 ViT runs then had a
# loss difference of 2e-5 after 20 steps, without a fault.
SMALL = shlex.split(
    "--model.width 64 --model.num-layers 2 --model.num-heads 2 --model.feedforward-width 128 "
    "--model.activation gelu"
)
SMALL_TEXT = shlex.split("--model.num-positions 32 --model.num-classes 1000")
SMALL_IMAGES = shlex.split("--model.image-size 32 --model.patch-size 8 --model.num-classes 3")
# The same on every machine. The learning rate is at its maximum after four steps, so that a fault
# shows. With three times this rate the loss of images falls so fast that bf16 differs by 2e-2.
OPTIMIZER = shlex.split("--optimizer.learning-rate 1e-3 --optimizer.warmup-steps 4")

# Options that the case or the comparison decides; a user cannot pass them to the recipe.
DECIDED_OPTIONS = shlex.split(
    "--strategy --devices --num-nodes --precision --compile --accelerator "
    "--activation-checkpointing --cpu-offload --batch-size --accumulate --max-steps --dropout "
    "--model.dropout --out --record --checkpoint-dir --resume --summary --dry-run --rehearse "
    "--json --config --print_config --help -h"
)

ADDRESS = "127.0.0.1"
PORT = 29500  # torch's default, for printed commands; a run here takes a free port
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class ParityTask:
    """What all cases of a recipe have in common."""

    recipe: Recipe
    accelerator: str
    steps: int
    global_batch_size: int
    options: tuple[str, ...] = ()  # of the user, for the recipe

    def arguments(self, case: Case) -> list[str]:
        """Returns the options of the recipe that train `case`; the last of a name wins."""
        small = [*SMALL, *(SMALL_IMAGES if self.recipe == "vit" else SMALL_TEXT)]
        if "--size" in map(_name_of, self.options):
            small = []
        steps, batch_size = self.steps, self.global_batch_size // (case.devices * case.accumulate)
        common = (
            f"--dropout 0 --optimizer.schedule-steps {steps} --validate-every {steps} "
            f"--validation-batches 1 --log-every {steps} --num-workers 0 --ceiling-s 0"
        ).split()
        nodes = f"--num-nodes {case.num_nodes} " if case.num_nodes > 1 else ""
        decided = (
            f"--accelerator {self.accelerator} --max-steps {steps} --strategy {case.strategy} "
            f"--devices {case.devices_per_node} {nodes}--precision {case.precision} "
            f"--compile {case.compile} --activation-checkpointing {case.activation_checkpointing} "
            f"--batch-size {batch_size} --accumulate {case.accumulate}"
        ).split()
        return [*small, *OPTIMIZER, *common, *self.options, *decided]


def _name_of(option: str) -> str:
    return option.partition("=")[0]


def check_options(options: Sequence[str]) -> None:
    """Raises ValueError for an option that the comparison itself decides."""
    for name in map(_name_of, options):
        if name in DECIDED_OPTIONS:
            raise ValueError(f"{name} is decided by the comparison; leave it out")


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

    The devices are per node. The log holds the output of all nodes, and the first failure as its
    last line.
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
    log.write_text(output, errors="replace")
    return replace(ended, elapsed_s=max(each.elapsed_s for each in ends))


def _devices_of(node: int, devices: int, accelerator: str) -> dict[str, str]:
    """Returns the variable that gives a node its share of this machine's GPUs."""
    if accelerator == "cpu":
        return {}
    visible = os.environ.get(VISIBLE)
    first, end = node * devices, (node + 1) * devices
    gpus = range(first, end) if visible is None else visible.split(",")[first:end]
    return {VISIBLE: ",".join(map(str, gpus))}
