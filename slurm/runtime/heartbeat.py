"""Heartbeats: each node of a job changes a file every 2 s, and slurm.job looks for nodes that have
stopped doing so.

Only that a file changes counts: the nodes' clocks differ. A suspected node is asked before anything
is done about it, as it may be alive and its file system slow.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

EACH_S = 2.0  # between two changes, and between two looks
LOOKS, SILENT_S = 3, 6.0  # without a change: so many, over so long


def beat(folder: Path, node: str, number: int) -> None:
    """Show that `node` lives, by a number that is another one each time."""
    with contextlib.suppress(OSError):  # a full disk ends no training here
        _path(folder, node).write_text(str(number))


@dataclass
class LastSeen:
    """What a node's file held at the last look, and for how long it has been the same."""

    text: str
    since_s: float
    looks: int = 0


@dataclass(kw_only=True)
class Heartbeats:
    """Looks at the files of `nodes`."""

    folder: Path
    nodes: Sequence[str]
    _next_s: float = 0.0
    _seen: dict[str, LastSeen] = field(default_factory=dict)

    def suspects(self, now_s: float | None = None) -> list[str]:
        """Nodes whose file has stopped changing; looks only when it is time."""
        now_s = time.monotonic() if now_s is None else now_s
        if now_s < self._next_s:
            return []
        self._next_s = now_s + EACH_S
        for name in self.nodes:
            self._look(name, now_s)
        # If no file changes, it is the file system.
        if all(seen.looks > 1 for seen in self._seen.values()):
            return []
        return [
            name
            for name, seen in self._seen.items()
            if seen.looks >= LOOKS and now_s - seen.since_s >= SILENT_S
        ]

    def clear(self, names: Sequence[str]) -> None:
        """They have answered: suspect them no sooner than if they had changed just now."""
        for name in names:
            self._seen.pop(name, None)

    def _look(self, name: str, now_s: float) -> None:
        try:
            text = _path(self.folder, name).read_text()
        except OSError:  # there is nothing yet, or the file system does not say
            return
        seen = self._seen.get(name)
        if seen is None or seen.text != text:
            self._seen[name] = LastSeen(text=text, since_s=now_s)
        else:
            seen.looks += 1


def _path(folder: Path, node: str) -> Path:
    return folder / f"{node}.pulse"
