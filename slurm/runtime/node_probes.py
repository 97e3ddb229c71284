"""The nodes of a job: which of them still answer, and which ranks were on those that do not."""

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurm import scheduler
from slurm.runtime.allocation import Allocation
from unitransformer.launch.failures import RankFailure, write_failure

PROBE_S = 6.0  # for a node to answer
PROBE_EACH_S = 0.1  # and so much longer where many are asked at once


@dataclass(kw_only=True)
class Probes:
    """Asks nodes of a job whether they still start anything; the answers come meanwhile."""

    asked: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    until_s: float = 0.0

    def ask(self, names: Sequence[str]) -> None:
        """Those that have not been asked yet."""
        new = [name for name in names if name not in self.asked]
        if not new:
            return
        options = ("--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--chdir=/")
        for name in new:
            self.asked[name] = subprocess.Popen(
                ["srun", *options, f"--nodelist={name}", "true"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.until_s = time.monotonic() + PROBE_S + PROBE_EACH_S * len(self.asked)

    def are_over(self) -> bool:
        """Whether `silent` would not wait."""
        return time.monotonic() > self.until_s or all(
            probe.poll() is not None for probe in self.asked.values()
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


def dead_nodes(allocation: Allocation, errors: Path, silent: Sequence[str]) -> dict[str, list[int]]:
    """Nodes that do not answer and none of whose ranks has left a word; with their ranks.

    Tasks are dealt out node by node.
    """
    names = scheduler.names_of(allocation.node_list) if silent else []
    each = allocation.tasks_per_node[0]
    ranks = {name: range(place * each, (place + 1) * each) for place, name in enumerate(names)}
    told = {int(path.stem) for path in errors.iterdir() if path.stem.isdigit()}
    return {name: list(ranks[name]) for name in silent if told.isdisjoint(ranks[name])}


def write_dead(dead: Mapping[str, Sequence[int]], errors: Path) -> None:
    """The failure of ranks that can tell nothing themselves."""
    for node, ranks in dead.items():
        told = f"{node} does not answer any more"
        for rank in ranks:
            failure = RankFailure(rank=rank, type="NodeFailure", message=told, lines=[])
            write_failure(failure, errors / f"{rank}.failure")
