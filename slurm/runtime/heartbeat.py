"""Heartbeats: each node of a job changes a file every 2 s, and slurm.job looks for silent nodes.

Only a change counts, since the clocks of nodes differ. A silent node is probed before anything is
done about it: it may be alive on a slow file system.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL_S = 2.0  # between two heartbeats, and between two checks
CHECKS, SILENT_S = 3, 6.0  # a node is suspected after that many checks and seconds without a change


def beat(folder: Path, node: str, number: int) -> None:
    """Shows that `node` is alive. `number` must change each time."""
    with contextlib.suppress(OSError):  # a full disk must not end training here
        _path(folder, node).write_text(str(number))


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

    def suspects(self, now_s: float | None = None) -> list[str]:
        """Returns the nodes whose file no longer changes; empty before the next check is due."""
        now_s = time.monotonic() if now_s is None else now_s
        if now_s < self._next_s:
            return []
        self._next_s = now_s + INTERVAL_S
        for node in self.nodes:
            self._check(node, now_s)
        # If no file changes, the file system is at fault.
        if all(seen.checks > 1 for seen in self._seen.values()):
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

    def _check(self, node: str, now_s: float) -> None:
        try:
            text = _path(self.folder, node).read_text()
        except OSError:  # not written yet, or the file system does not answer
            return
        seen = self._seen.get(node)
        if seen is None or seen.text != text:
            self._seen[node] = LastSeen(text=text, since_s=now_s)
        else:
            seen.checks += 1


def _path(folder: Path, node: str) -> Path:
    return folder / f"heartbeat-{node}"
