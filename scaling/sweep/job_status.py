"""What a sweep tells the job that has started it: which cell runs, and in the end what became of
all; in a file that the job names. One that nobody has named is not written.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling.store.outcome import CELLS, Outcome
from scaling.sweep.engine import SweepObserver, SweepSummary
from scaling.sweep.plan import CellTask
from unitransformer.files import write_atomically
from unitransformer.launch.variables import SWEEP_FILE


class JobReporter:
    """A `SweepObserver` that tells another one, too."""

    def __init__(self, watch: SweepObserver, folder: Path) -> None:
        self._watch, self._cells = watch, folder.absolute() / CELLS

    def begins(self, task: CellTask) -> None:
        _write({"cell": str(self._cells / task.name)})
        self._watch.begins(task)

    def ended(self, task: CellTask, outcome: Outcome) -> None:
        self._watch.ended(task, outcome)


def report_summary(summary: SweepSummary) -> None:
    """Raises OSError; without it the job does not take the sweep for done."""
    _write({name: getattr(summary, name) for name in ("statuses", "own", "left")})


def _write(told: Mapping[str, Any]) -> None:
    if path := os.environ.get(SWEEP_FILE):
        write_atomically(Path(path), json.dumps(told).encode())
