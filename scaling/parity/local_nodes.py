"""A run on several nodes, tried on this one machine: a command line a node, all at once."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from scaling.recipe_process import Ended, Runner, can_fork, run_alone, start_worker
from unitransformer.config import Recipe

ADDRESS = "127.0.0.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Nodes:
    """What runs a recipe on each of some nodes."""

    def __init__(self, workers: Sequence[Runner], others: ThreadPoolExecutor) -> None:
        self._workers = workers
        self._others = others

    def __call__(
        self,
        recipe: Recipe,
        arguments: Sequence[str],
        *,
        accelerator: str,
        devices: int,
        num_nodes: int,
        log: Path,
        limit_s: float,
    ) -> Ended:
        """How it ended, as the first node that has not ended well; what all said is in `log`.

        Args:
            devices: of each node.
        """
        runners = self._workers if can_fork(accelerator) else [run_alone] * num_nodes
        variables = [_variables(node, devices, accelerator) for node in range(num_nodes)]
        port = {"MASTER_PORT": str(_free_port())}
        logs = [log.with_name(f"{log.name}-{node}") for node in range(num_nodes)]

        def run(node: int) -> Ended:
            own = variables[node] | port if num_nodes > 1 else {}
            return runners[node](recipe, arguments, log=logs[node], limit_s=limit_s, variables=own)

        following = [self._others.submit(run, node) for node in range(1, num_nodes)]
        try:
            ends = [run(0)]
        finally:
            ends_of_others = [future.result() for future in following]
        ends += ends_of_others
        log.write_text("".join(path.read_text(errors="replace") for path in logs))
        worst = next((ended for ended in ends if ended.exit_code != 0), ends[0])
        return replace(worst, elapsed_s=max(ended.elapsed_s for ended in ends))


@contextlib.contextmanager
def start_nodes(folder: Path, num_nodes: int) -> Iterator[Nodes]:
    """As many nodes until the block ends; `folder` is for what their workers say."""
    with ThreadPoolExecutor() as others, contextlib.ExitStack() as held:
        workers = [
            held.enter_context(start_worker(folder / f"worker-{node}.log", at_once=node > 0))
            for node in range(num_nodes)
        ]
        yield Nodes(workers, others)


def _variables(node: int, devices: int, accelerator: str) -> dict[str, str]:
    """What a launcher on a node finds in its environment, its port left out."""
    meeting = {"MASTER_ADDR": ADDRESS, "NODE_RANK": str(node)}
    if accelerator == "cpu":
        return meeting
    given = os.environ.get(VISIBLE)
    first, end = node * devices, (node + 1) * devices
    own = range(first, end) if given is None else given.split(",")[first:end]
    return meeting | {VISIBLE: ",".join(map(str, own))}


def _free_port() -> int:
    with socket.create_server((ADDRESS, 0)) as probe:
        return int(probe.getsockname()[1])
