"""Reports sweep progress to the SLURM job that started it, if the job named a file for that."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling.store.outcome import CELLS, CellOutcome
from scaling.sweep.engine import SweepObserver, SweepSummary
from scaling.sweep.plan import CellTask
from unitransformer.files import write_atomically
from unitransformer.launch.variables import SWEEP_FILE


class JobReporter:
    """A `SweepObserver` that writes the running cell to the file and notifies another observer."""

    def __init__(self, observer: SweepObserver, folder: Path) -> None:
        self._observer, self._cells = observer, folder.absolute() / CELLS

    def cell_started(self, task: CellTask) -> None:
        _write({"cell": str(self._cells / task.name)})
        self._observer.cell_started(task)

    def cell_finished(self, task: CellTask, outcome: CellOutcome) -> None:
        self._observer.cell_finished(task, outcome)


def report_summary(summary: SweepSummary) -> None:
    """Writes the end of the sweep, without which the job counts as failed; raises OSError."""
    _write({"statuses": summary.statuses, "own": summary.statuses_here, "left": summary.left})


def _write(values: Mapping[str, Any]) -> None:
    if path := os.environ.get(SWEEP_FILE):
        write_atomically(Path(path), json.dumps(values).encode())
