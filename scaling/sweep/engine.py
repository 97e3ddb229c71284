"""Runs the cells of a study until every one has an outcome in the folder of the sweep.

The folder is the only state. Finished cells are not run again, so that the same command continues a
stopped sweep, and several processes can share one. A cell is claimed by a lock, which ends with the
process that holds it, and it is finished by one file, which is written atomically.
"""

import contextlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from scaling.recipe_process import ProcessResult, Runner
from scaling.store.outcome import CELLS, FILE, STUDY, CellOutcome, load_outcome, write_outcome
from scaling.sweep.claims import Claim, claim
from scaling.sweep.memory_inference import OomCauses, find_cause, is_recheck, root_cause
from scaling.sweep.plan import CellTask
from scaling.sweep.run_cell import Limits, now, outcome_without_run, run_cell
from scaling.sweep.study import Study
from unitransformer.files import write_atomically
from unitransformer.record.checksums import add_checksums, read_json, verify_checksums
from unitransformer.record.units import format_count

SCHEMA = 1

# Returns the tasks of a sweep in order, given the outcomes so far; a search adds tasks as it goes.
Agenda = Callable[[Mapping[str, CellOutcome]], Sequence[CellTask]]


class SweepObserver(Protocol):
    """Is notified of the cells that this process runs."""

    def cell_started(self, task: CellTask) -> None: ...
    def cell_finished(self, task: CellTask, outcome: CellOutcome) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """The statuses of all cells, and the time that this process has spent."""

    statuses: Mapping[str, int]
    statuses_here: Mapping[str, int]  # of the cells that this process has run
    left: int  # claimed by other processes, or waiting for them
    checked: int  # cells that were inferred to be out of memory and run all the same
    refuted: int  # of those, the ones that fitted
    elapsed_s: float
    in_cells_s: float  # part of `elapsed_s` in which a cell ran

    def format(self) -> str:
        statuses = ", ".join(f"{number} {status}" for status, number in self.statuses.items())
        text = f"{format_count(sum(self.statuses.values()), 'cell')} finished ({statuses})"
        if self.left:
            text += f", {self.left} left to other processes"
        if self.checked:
            cells = format_count(self.checked, "cell")
            text += f"; ran {cells} inferred to be out of memory, {self.refuted} fitted"
        return text


def open_folder(
    folder: Path, study: Study, limits: Limits, *, find_max_batch: int | None = None
) -> None:
    """Creates the folder of a sweep, or checks that it holds the same sweep.

    Raises:
        ValueError: it holds another sweep, or other files.
        OSError: it cannot be written.
    """
    compared = {
        "schema": SCHEMA,
        "memory_limit_bytes": limits.memory_limit_bytes,
        "find_max_batch": find_max_batch,
        "study": study.as_dict(),
    }
    path = folder / STUDY
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{STUDY}.lock"):
        if not path.exists():
            # A sweep that was killed at this point leaves a temporary file.
            ours = (f"{STUDY}.lock", f".{STUDY}.")
            if not all(entry.name.startswith(ours) for entry in folder.iterdir()):
                raise ValueError(f"out {folder} holds something else; choose an empty folder")
            content = add_checksums({"kind": "study", **compared})
            write_atomically(path, json.dumps(content, indent=1).encode())
            return
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise ValueError(f"{path}: not the study of a sweep; choose another --out")
        verify_checksums(stored, str(path))
    for name, given in compared.items():
        if stored.get(name) != given:
            difference = _first_difference(stored.get(name), given, name)
            raise ValueError(
                f"out {folder} holds another sweep: {difference}; give the same options, or "
                "another --out"
            )


def _first_difference(stored: Any, given: Any, name: str) -> str:
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in dict.fromkeys([*stored, *given]):
            if stored.get(key) != given.get(key):
                return _first_difference(stored.get(key), given.get(key), f"{name}.{key}")
    return f"{name} is {json.dumps(stored)} there and {json.dumps(given)} here"


@dataclass(kw_only=True)
class Sweep:
    """Works on the cells of a folder until none is left."""

    folder: Path
    agenda: Agenda
    limits: Limits
    runner: Callable[[CellTask], Runner]
    host: Mapping[str, Any] | None = None  # processor, memory and GPUs of this machine
    retry: frozenset[str] = frozenset()  # statuses to run again
    retry_before: str | None = None  # only if they finished before; None: before this process began
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._outcomes = OutcomeCache(self.folder)
        self._retry_before = self.retry_before or now()
        self._in_cells_s = 0.0

    def work(self, observer: SweepObserver, *, max_cells: int | None = None) -> SweepSummary:
        """Finishes all tasks that no other process has claimed.

        Args:
            max_cells: run at most so many cells.

        Raises:
            OSError: the disk is full or read-only; finished cells stay.
            KeyboardInterrupt: a signal ended the running cell, which stays unfinished.
        """
        start_s = self.clock()
        statuses_here: list[str] = []
        while (max_cells is None or len(statuses_here) < max_cells) and (next_ := self._claim()):
            task, held = next_
            try:
                observer.cell_started(task)
                outcome = self._finish(task)
                observer.cell_finished(task, outcome)
            finally:
                held.release()
            if outcome.started_at is not None:
                statuses_here.append(outcome.status)
        tasks, done = self.scan()
        statuses = Counter(outcome.status for outcome in done.values())
        checks = [outcome for outcome in done.values() if outcome.checks is not None]
        return SweepSummary(
            statuses=dict(sorted(statuses.items(), key=lambda item: (item[0] != "ok", item[0]))),
            left=len(tasks) - len(done),
            checked=len(checks),
            refuted=sum(outcome.status == "ok" for outcome in checks),
            statuses_here=Counter(statuses_here),
            elapsed_s=self.clock() - start_s,
            in_cells_s=self._in_cells_s,
        )

    def scan(self) -> tuple[Sequence[CellTask], dict[str, CellOutcome]]:
        """Returns all tasks known so far, and the outcomes of the finished ones by name."""
        done: dict[str, CellOutcome] = {}
        while True:
            tasks = self.agenda(done)
            found = self._done(tasks)
            if found.keys() == done.keys():
                return tasks, found
            done = found

    def _done(self, tasks: Sequence[CellTask]) -> dict[str, CellOutcome]:
        """Returns valid outcomes: an inferred one counts only while its cause does."""
        outcomes = self._not_retried(tasks)
        causes = OomCauses(outcomes.values())
        return {
            name: outcome
            for name, outcome in outcomes.items()
            if outcome.status != "oom-inferred"
            or outcome.config is None
            or find_cause(outcome.config, causes.on(outcome.host)) is not None
        }

    def _not_retried(self, tasks: Sequence[CellTask]) -> dict[str, CellOutcome]:
        """Returns outcomes except those to be retried, which must not imply others."""
        return {
            name: outcome
            for name, outcome in self._outcomes.load(tasks).items()
            if not self._is_retried(outcome)
        }

    def _is_retried(self, outcome: CellOutcome) -> bool:
        return outcome.status in self.retry and (outcome.finished_at or "") < self._retry_before

    def _claim(self) -> tuple[CellTask, Claim] | None:
        """Claims the next task that is neither finished nor claimed."""
        tasks, done = self.scan()
        for task in tasks:
            if task.name in done or (claimed := claim(self.folder, task.name)) is None:
                continue
            if task.name not in self._done([task]):  # another process may have just finished it
                return task, claimed
            claimed.release()
        return None

    def _finish(self, task: CellTask) -> CellOutcome:
        folder = self.folder / CELLS / task.name
        cause, is_run = self._cause(task)
        if is_run:
            runner = self._timed(self.runner(task))
            outcome = replace(run_cell(task, runner, self.folder, self.limits), checks=cause)
        else:
            outcome = outcome_without_run(task, cause)
            shutil.rmtree(folder, ignore_errors=True)  # files of an earlier attempt
        outcome = replace(
            outcome,
            host=self.host,
            memory_limit_bytes=self.limits.memory_limit_bytes,
            finished_at=now(),
        )
        write_outcome(outcome, folder)
        return outcome

    def _cause(self, task: CellTask) -> tuple[str | None, bool]:
        """Returns the cell that implies that the task is out of memory, and whether to run it."""
        if task.config is None:
            return None, False
        tasks, _ = self.scan()
        done = self._not_retried(tasks)
        causes = OomCauses(done.values()).on(self.host)
        cause = root_cause(task.config, causes)
        before = self._outcomes.load([task]).get(task.name)
        if cause is None or (before is not None and self._is_retried(before)):
            return cause, True
        share = self.limits.recheck
        return cause, is_recheck(task, (cause, causes[cause]), tasks, done, share)

    def _timed(self, runner: Runner) -> Runner:
        def run(*arguments: Any, **options: Any) -> ProcessResult:
            start_s = self.clock()
            try:
                return runner(*arguments, **options)
            finally:
                self._in_cells_s += self.clock() - start_s

        return run


class OutcomeCache:
    """Loads outcomes from the folder of a sweep; a file is read again only when it has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / CELLS
        self._loaded: dict[str, tuple[tuple[int, int], CellOutcome]] = {}

    def load(self, tasks: Sequence[CellTask]) -> dict[str, CellOutcome]:
        """Returns outcomes by task name; a missing or damaged file counts as unfinished."""
        outcomes = {}
        for name in (task.name for task in tasks):
            path = self.folder / name / FILE
            with contextlib.suppress(OSError, ValueError):
                stat = path.stat()
                version = (stat.st_mtime_ns, stat.st_ino)
                if name not in self._loaded or self._loaded[name][0] != version:
                    self._loaded[name] = (version, load_outcome(path))
                outcomes[name] = self._loaded[name][1]
        return outcomes
