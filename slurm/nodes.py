"""The nodes of a job: which of them still answer, and which ranks were on those that do not."""

import contextlib
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm import queue
from slurm.allocation import Allocation

PROBE_S = 6.0  # for a node to answer
PROBE_EACH_S = 0.1  # and so much longer where many are asked at once


@dataclass(kw_only=True)
class Probes:
    """Asks each node of a job whether it still starts anything; the answers come meanwhile."""

    asked: dict[str, "subprocess.Popen[bytes]"]
    until_s: float

    @classmethod
    def start(cls, allocation: Allocation) -> "Probes":
        options = ("--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1")
        names = names_of(allocation) if allocation.nodes > 1 else []
        return cls(
            asked={
                name: subprocess.Popen(
                    ["srun", *options, f"--nodelist={name}", "true"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                for name in names
            },
            until_s=time.monotonic() + PROBE_S + PROBE_EACH_S * len(names),
        )

    def silent(self) -> list[str]:
        """Nodes that have not answered in time; none if none has, as then it is not they."""
        found = []
        for name, probe in self.asked.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                probe.wait(max(0.0, self.until_s - time.monotonic()))
            if probe.poll() != 0:
                probe.kill()
                found.append(name)
        return found if len(found) < len(self.asked) else []


def names_of(allocation: Allocation) -> list[str]:
    return queue.call("scontrol", "show", "hostnames", allocation.node_list).stdout.split()


def dead_nodes(allocation: Allocation, errors: Path, silent: Sequence[str]) -> dict[str, list[int]]:
    """Nodes that do not answer and none of whose ranks has left a word; with their ranks.

    Tasks are dealt out node by node.
    """
    names = names_of(allocation) if silent else []
    each = allocation.tasks_per_node[0]
    ranks = {name: range(place * each, (place + 1) * each) for place, name in enumerate(names)}
    told = {int(path.stem) for path in errors.iterdir() if path.stem.isdigit()}
    return {name: list(ranks[name]) for name in silent if told.isdisjoint(ranks[name])}
