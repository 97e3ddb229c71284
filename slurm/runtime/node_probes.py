"""Asks suspected nodes whether they are alive, and finds the ranks on those that are dead."""

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurm import scheduler
from slurm.runtime.allocation import Allocation
from unitransformer.launch.failures import RankFailure, write_failure

PROBE_S, PROBE_PER_NODE_S = 6.0, 0.1  # timeout


@dataclass(kw_only=True)
class Probes:
    """Starts a trivial srun on each node that is asked; the answers arrive in the background."""

    asked: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    until_s: float = 0.0

    def ask(self, nodes: Sequence[str]) -> None:
        """Probes the nodes that were not asked before."""
        new = [node for node in nodes if node not in self.asked]
        if not new:
            return
        options = ("--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--chdir=/")
        for node in new:
            self.asked[node] = subprocess.Popen(
                ["srun", *options, f"--nodelist={node}", "true"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.until_s = time.monotonic() + PROBE_S + PROBE_PER_NODE_S * len(self.asked)

    def are_over(self) -> bool:
        """Returns whether `silent` would return at once."""
        return time.monotonic() > self.until_s or all(
            probe.poll() is not None for probe in self.asked.values()
        )

    def silent(self) -> list[str]:
        """Waits, and returns the nodes that did not answer in time.

        Returns no node if none answered: then the controller is at fault.
        """
        silent = []
        for node, probe in self.asked.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                probe.wait(max(0.0, self.until_s - time.monotonic()))
            if probe.poll() != 0:
                probe.kill()
                silent.append(node)
        return silent if len(silent) < len(self.asked) else []


def find_dead_nodes(
    allocation: Allocation, errors: Path, silent: Sequence[str]
) -> dict[str, list[int]]:
    """Returns the silent nodes whose ranks have not reported how they ended, with these ranks."""
    if not silent:
        return {}
    reported = {int(path.stem) for path in errors.iterdir() if path.stem.isdigit()}
    tasks = allocation.tasks_per_node[0]
    nodes = scheduler.expand_nodes(allocation.node_list)  # ranks are numbered node by node
    ranks = {node: range(index * tasks, (index + 1) * tasks) for index, node in enumerate(nodes)}
    return {node: list(ranks[node]) for node in silent if reported.isdisjoint(ranks[node])}


def write_node_failures(dead: Mapping[str, Sequence[int]], errors: Path) -> None:
    """Writes the failures of ranks that died with their nodes."""
    for node, ranks in dead.items():
        for rank in ranks:
            message = f"{node} stopped responding"
            failure = RankFailure(rank=rank, type="NodeFailure", message=message, lines=[])
            write_failure(failure, errors / f"{rank}.failure")
