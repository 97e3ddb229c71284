"""Finds dead nodes: each node of a job changes a file every 2 s, and slurm.job probes silent ones.

Only a change counts, since the clocks of nodes differ. A silent node is probed before anything is
done about it: it may be alive on a slow file system.
"""

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurm import scheduler
from slurm.runtime.allocation import Allocation
from unitransformer.launch.failures import RankFailure, write_failure

INTERVAL_S = 2.0  # between two heartbeats, and between two checks
CHECKS, SILENT_S = 3, 6.0  # a node is suspected after that many checks and seconds without a change
ENDED = "ended"  # instead of a heartbeat: the first rank of the node has ended
PROBE_S, PROBE_PER_NODE_S = 6.0, 0.1  # timeout
ON_NODE = ("srun", "--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--chdir=/")


def beat(folder: Path, node: str, text: str) -> None:
    """Shows that `node` is alive. `text` must change each time, until it is `ENDED`."""
    with contextlib.suppress(OSError):  # a full disk must not end training here
        _path(folder, node).write_text(text)


@dataclass
class LastSeen:
    """The last heartbeat of a node, and how long it has not changed."""

    text: str
    since_s: float
    checks: int = 0


@dataclass(kw_only=True)
class Heartbeats:
    """Watches the heartbeat files of `nodes`."""

    folder: Path
    nodes: Sequence[str]
    _next_s: float = 0.0
    _seen: dict[str, LastSeen] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)  # nodes that no longer send any

    def suspects(self, now_s: float | None = None) -> list[str]:
        """Returns the nodes whose file no longer changes; empty before the next check is due."""
        now_s = time.monotonic() if now_s is None else now_s
        if now_s < self._next_s:
            return []
        self._next_s = now_s + INTERVAL_S
        for node in self.nodes:
            with contextlib.suppress(OSError):  # not written yet, or no answer of the file system
                text = _path(self.folder, node).read_text()
                if text == ENDED:
                    self._ended.add(node)
                    self._seen.pop(node, None)
                elif node in self._seen and self._seen[node].text == text:
                    self._seen[node].checks += 1
                else:
                    self._seen[node] = LastSeen(text=text, since_s=now_s)
        # If no file changes, the file system is at fault, unless other nodes have ended.
        if not self._ended and all(seen.checks > 1 for seen in self._seen.values()):
            return []
        return [
            node
            for node, seen in self._seen.items()
            if seen.checks >= CHECKS and now_s - seen.since_s >= SILENT_S
        ]

    def forget(self, nodes: Sequence[str]) -> None:
        """Starts the wait for these nodes again, since they answered a probe."""
        for node in nodes:
            self._seen.pop(node, None)


def _path(folder: Path, node: str) -> Path:
    return folder / f"heartbeat-{node}"


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
        for node in new:
            self.asked[node] = subprocess.Popen(
                [*ON_NODE, f"--nodelist={node}", "true"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.until_s = time.monotonic() + PROBE_S + PROBE_PER_NODE_S * len(self.asked)

    def are_over(self) -> bool:
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
    tasks, nodes = allocation.tasks_per_node[0], list_nodes(allocation)
    ranks = {node: range(index * tasks, (index + 1) * tasks) for index, node in enumerate(nodes)}
    found = {node: list(ranks[node]) for node in silent if node in ranks}
    return {node: own for node, own in found.items() if reported.isdisjoint(own)}


def list_nodes(allocation: Allocation) -> list[str]:
    """Returns the nodes of the job in the order of ranks; none if SLURM does not answer."""
    with contextlib.suppress(ValueError, RuntimeError):
        return scheduler.expand_nodes(allocation.node_list)
    return []


def find_unheard_nodes(allocation: Allocation, errors: Path) -> list[str]:
    """Returns the nodes that have never sent a heartbeat, although the first one has.

    If srun fails and no rank reports why, srun has not started them or they do not see the folder.
    """
    nodes = list_nodes(allocation)
    if not nodes or not _path(errors, nodes[0]).exists():  # srun has started no rank
        return []
    return [node for node in nodes[1:] if not _path(errors, node).exists()]


def is_blind(node: str, errors: Path) -> bool:
    """Returns whether the node answers that it does not see what another has written.

    It may have made the folder itself, on its own disk.
    """
    written = next(errors.glob(_path(errors, "*").name))
    ask = ("sh", "-c", 'test -e "$1" || echo no', "sh", str(written))
    with contextlib.suppress(ValueError, RuntimeError):
        return scheduler.call(*ON_NODE, f"--nodelist={node}", *ask).stdout.strip() == "no"
    return False


def write_node_failures(dead: Mapping[str, Sequence[int]], errors: Path) -> None:
    """Writes the failures of ranks that died with their nodes."""
    for node, ranks in dead.items():
        for rank in ranks:
            message = f"{node} stopped responding"
            failure = RankFailure(rank=rank, type="NodeFailure", message=message, lines=[])
            write_failure(failure, errors / f"{rank}.failure")
