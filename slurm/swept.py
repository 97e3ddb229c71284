"""What the sweep of a task tells: which cell runs, and in the end what became of its cells."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.markers import read_json

FILE = "sweep"  # in the folder where the ranks of a start leave their words


@dataclass(frozen=True, kw_only=True)
class Swept:
    """The end of a sweep's process, by its own word."""

    statuses: Mapping[str, int]  # of all cells that are finished
    own: Mapping[str, int]  # of those that it has run
    left: int  # to other processes

    @property
    def is_refused(self) -> bool:
        """Nothing could be measured, by any task."""
        return self.left == 0 and set(self.statuses) == {"refused"}

    def in_words(self) -> str:
        if self.is_refused:
            return f"{in_words(self.statuses)}: its recipes take no cell of this sweep"
        beyond = f", {self.left} left to other tasks" if self.left else ""
        if self.own:
            return f"of its cells {in_words(self.own)}{beyond}"
        return f"nothing was left to run: {in_words(self.statuses) or 'none finished'}{beyond}"


def in_words(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {status}" for status, number in sorted(statuses.items()))


def read_swept(errors: Path) -> Swept | None:
    """None if the sweep did not come to its end."""
    told = read_json(errors / FILE) or {}
    if not {"statuses", "own", "left"} <= told.keys():
        return None
    return Swept(statuses=told["statuses"], own=told["own"], left=told["left"])


def find_cell(errors: Path) -> Path | None:
    """The folder of the cell that runs, or ran last before a sudden end."""
    cell = (read_json(errors / FILE) or {}).get("cell")
    return None if cell is None else Path(cell)
