"""Signs of life: each node of a job, and the job itself, changes a file that all of them see, and
whoever looks learns who has ceased to.

Only that a file changes counts: the nodes' clocks differ. Who is suspected is asked before anything
is done about it, as a node may be alive and its file system slow.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

JOB = "slurm.job"  # its name among those of nodes
EACH_S = 2.0  # between two changes, and between two looks
LOOKS, SILENT_S = 3, 6.0  # without a change: so many, over so long


@dataclass
class Still:
    """What was seen last, and for how long it has been the same."""

    text: str
    since_s: float
    looks: int = 0


@dataclass(kw_only=True)
class Pulse:
    """Of one process: shows that it lives, and looks at `others`."""

    folder: Path
    own: str
    others: Sequence[str]
    _number: int = 0
    _next_s: float = 0.0
    _seen: dict[str, Still] = field(default_factory=dict)

    def beat(self, now_s: float | None = None) -> list[str]:
        """Show it, and who has ceased to; does nothing if it is not time yet."""
        now_s = time.monotonic() if now_s is None else now_s
        if now_s < self._next_s:
            return []
        self._next_s = now_s + EACH_S
        self._number += 1
        with contextlib.suppress(OSError):  # a full disk ends no training here
            self._path(self.own).write_text(str(self._number))
        for name in self.others:
            self._look(name, now_s)
        # If nobody's changes, it is the file system.
        if all(still.looks > 1 for still in self._seen.values()):
            return []
        return [
            name
            for name, still in self._seen.items()
            if still.looks >= LOOKS and now_s - still.since_s >= SILENT_S
        ]

    def clear(self, names: Sequence[str]) -> None:
        """They have answered: suspect them no sooner than if they had changed just now."""
        for name in names:
            self._seen.pop(name, None)

    def read(self, name: str) -> str | None:
        """What changes; None if there is nothing yet, or the file system does not say."""
        try:
            return self._path(name).read_text()
        except OSError:
            return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pulse"

    def _look(self, name: str, now_s: float) -> None:
        text = self.read(name)
        still = self._seen.get(name)
        if text is None:
            return
        if still is None or still.text != text:
            self._seen[name] = Still(text=text, since_s=now_s)
        else:
            still.looks += 1
