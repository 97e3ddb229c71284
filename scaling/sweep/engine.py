"""Runs the cells of a study until every one has an outcome in the folder of the sweep.

The folder is the only state. Finished cells are not run again, so that the same command continues a
stopped sweep, and several processes can share one. A cell is claimed by a lock, which ends with the
process that holds it, and it is finished by one file, which is written atomically.
"""

import contextlib
import functools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from scaling.recipe_process import Runner
from scaling.store.outcome import CELLS, FILE, STUDY, CellOutcome, load_outcome, write_outcome
from scaling.sweep.claims import JOB_ID, claim, find_holders
from scaling.sweep.memory_inference import OomCauses, find_cause, is_recheck, root_cause
from scaling.sweep.plan import CellTask
from scaling.sweep.run_cell import (
    Limits,
    now,
    outcome_without_run,
    replacing,
    run_cell,
    settle_attempts,
)
from scaling.sweep.study import Study
from unitransformer.files import write_atomically
from unitransformer.launch.variables import SWEEP_FILE
from unitransformer.record.checksums import add_checksums, read_json, verify_checksums
from unitransformer.record.units import format_count

SCHEMA = 1

# Returns the tasks of a sweep in order, given the outcomes so far; a search adds tasks as it goes.
Agenda = Callable[[Mapping[str, CellOutcome]], Sequence[CellTask]]


class SweepObserver(Protocol):
    """Is notified of the cells that this process runs."""

    def cell_started(self, task: CellTask) -> None: ...
    def cell_finished(self, task: CellTask, outcome: CellOutcome) -> None: ...


class Unobserved:
    """Shows nothing."""

    def cell_started(self, task: CellTask) -> None: ...
    def cell_finished(self, task: CellTask, outcome: CellOutcome) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """The statuses of all cells."""

    statuses: Mapping[str, int]
    statuses_here: Mapping[str, int]  # of the cells that this process has run
    left: int  # not finished
    claimed: int  # of those, by other processes
    checked: int  # cells that were inferred to be out of memory and run all the same
    refuted: int  # of those, the ones that fitted

    def format(self) -> str:
        statuses = ", ".join(f"{number} {status}" for status, number in self.statuses.items())
        number = sum(self.statuses.values())
        text = f"{format_count(number, 'cell')} finished ({statuses})"
        if not number:
            text = "no cell finished"
        if self.claimed:
            text += f", {self.claimed} claimed by other processes"
        if not_run := self.left - self.claimed:
            text += f", {not_run} not run"
        if self.checked:
            cells = format_count(self.checked, "cell")
            text += f"; ran {cells} inferred to be out of memory, {self.refuted} fitted"
        return text


def open_folder(
    folder: Path, study: Study, limits: Limits, *, find_max_batch: int | None = None
) -> None:
    """Creates the folder of a sweep, or adds launches to it if the study asks for more now.

    Raises ValueError if the folder holds other files or another sweep.
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
            _write_study(path, compared)
            return
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise ValueError(f"{path}: not the study of a sweep; choose another --out")
        verify_checksums(stored, str(path))
        if _only_adds_launches(stored, compared):
            _write_study(path, compared)
            return
    for name, given in compared.items():
        if stored.get(name) != given:
            difference = _first_difference(stored.get(name), given, name)
            raise ValueError(
                f"out {folder} holds another sweep: {difference}; give the same options, or "
                "another --out"
            )


def _write_study(path: Path, compared: Mapping[str, Any]) -> None:
    content = add_checksums({"kind": "study", **compared})
    write_atomically(path, json.dumps(content, indent=1).encode())


def _only_adds_launches(stored: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    old, new = stored.get("study"), given["study"]
    others_agree = all(stored.get(name) == given[name] for name in given if name != "study")
    if (
        not others_agree
        or not isinstance(old, dict)
        or old.get("repeats", math.inf) >= new["repeats"]
    ):
        return False
    return {**old, "repeats": new["repeats"]} == dict(new)


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
    num_nodes: int | None = 1  # of the cells that run here; None: any
    retry: frozenset[str] = frozenset()  # statuses to run again
    # Only if they finished before; by default before this process began.
    retry_before: str = field(default_factory=now)

    def work(
        self,
        observer: SweepObserver,
        *,
        max_cells: int | None = None,
        stop_after_s: float | None = None,
    ) -> SweepSummary:
        """Finishes all tasks for here that no other process has claimed.

        Args:
            max_cells: run at most so many.
            stop_after_s: begin none that would end later, if it takes as long as the longest.

        Raises OSError for a full or read-only disk, KeyboardInterrupt for a signal that ends the
        running cell, which stays unfinished. Finished cells stay.
        """
        statuses_here: list[str] = []
        longest_s = 0.0
        end_s = math.inf if stop_after_s is None else time.monotonic() + stop_after_s
        while (
            (max_cells is None or len(statuses_here) < max_cells)
            and time.monotonic() + longest_s < end_s
            and (next_ := self._claim())
        ):
            task, claimed = next_
            with claimed:
                cell = str(self.folder.absolute() / CELLS / task.name)
                _report({"cell": cell, "finished": len(statuses_here)})
                observer.cell_started(task)
                outcome = self._finish(task)
                observer.cell_finished(task, outcome)
            if outcome.started_at is not None:
                statuses_here.append(outcome.status)
                longest_s = max(longest_s, outcome.elapsed_s)
        holders = find_holders(self.folder)  # first: what they finish meanwhile is in `done`
        tasks, done = self.scan()
        tasks = [task for task in tasks if self._is_here(task)]
        done = {task.name: done[task.name] for task in tasks if task.name in done}
        statuses = Counter(outcome.status for outcome in done.values())
        checks = [outcome for outcome in done.values() if outcome.checks is not None]
        summary = SweepSummary(
            statuses=dict(sorted(statuses.items(), key=lambda item: (item[0] != "ok", item[0]))),
            left=len(tasks) - len(done),
            claimed=len({task.name for task in tasks} & holders.keys() - done.keys()),
            checked=len(checks),
            refuted=sum(outcome.status == "ok" for outcome in checks),
            statuses_here=Counter(statuses_here),
        )
        # Without it, the job counts as failed.
        _report({"statuses": summary.statuses, "own": summary.statuses_here, "left": summary.left})
        return summary

    def scan(self) -> tuple[Sequence[CellTask], dict[str, CellOutcome]]:
        """Returns all tasks known so far, and the outcomes of the finished ones by name."""
        tasks = self.agenda({})
        while True:
            done = self._done(tasks)
            if (known := self.agenda(done)) == tasks:
                return tasks, done
            tasks = known

    def _done(self, tasks: Sequence[CellTask]) -> dict[str, CellOutcome]:
        """Returns valid outcomes: an inferred one counts only while its cause does."""
        outcomes = self._load(tasks)
        causes = OomCauses(outcomes.values())
        return {
            name: outcome
            for name, outcome in outcomes.items()
            if outcome.status != "oom-inferred"
            or outcome.config is None
            or find_cause(outcome.config, causes.on(outcome.host)) is not None
        }

    def _load(self, tasks: Sequence[CellTask], are_retried: bool = False) -> dict[str, CellOutcome]:
        """Returns the outcomes that are to be retried, or the others, which alone imply others.

        A missing or damaged file counts as unfinished.
        """
        outcomes = {}
        for task in tasks:
            path = self.folder / CELLS / task.name / FILE
            with contextlib.suppress(OSError, ValueError):
                stat = path.stat()
                outcome = _load_version(path, (stat.st_mtime_ns, stat.st_ino))
                is_late = (outcome.finished_at or "") >= self.retry_before
                if are_retried == (outcome.status in self.retry and not is_late):
                    outcomes[task.name] = outcome
        return outcomes

    def _is_here(self, task: CellTask) -> bool:
        # Any process can finish a cell that the recipe refuses.
        return self.num_nodes in (None, task.num_nodes) or task.config is None

    def _claim(self) -> tuple[CellTask, contextlib.ExitStack] | None:
        """Claims the next task that is neither finished nor claimed."""
        tasks, done = self.scan()
        for task in tasks:
            if task.name in done or not self._is_here(task):
                continue
            if (claimed := claim(self.folder, task.name)) is None:
                continue
            settle_attempts(self.folder / CELLS / task.name)
            if task.name not in self.scan()[1]:  # another process may have just finished it
                return task, claimed
            claimed.close()
        return None

    def _finish(self, task: CellTask) -> CellOutcome:
        folder = self.folder / CELLS / task.name
        cause, is_run = self._cause(task)
        with replacing(folder):
            if is_run:
                outcome = run_cell(task, self.runner(task), self.folder, self.limits)
                outcome = replace(outcome, checks=cause)
            else:
                outcome = outcome_without_run(task, cause)
            limit = self.limits.memory_limit_bytes
            outcome = replace(
                outcome,
                host=self.host,
                memory_limit_bytes=limit,
                finished_at=now(),
                slurm_job=os.environ.get(JOB_ID),
            )
            write_outcome(outcome, folder)
        return outcome

    def _cause(self, task: CellTask) -> tuple[str | None, bool]:
        """Returns the cell that implies that the task is out of memory, and whether to run it."""
        if task.config is None:
            return None, False
        tasks, _ = self.scan()
        done = self._load(tasks)
        causes = OomCauses(done.values()).on(self.host)
        cause = root_cause(task.config, causes)
        if cause is None or self._load([task], are_retried=True):
            return cause, True
        share = self.limits.recheck
        return cause, is_recheck(task, (cause, causes[cause]), tasks, done, share)


@functools.lru_cache(maxsize=65536)
def _load_version(path: Path, _version: tuple[int, int]) -> CellOutcome:
    """Reads a file again only when it has changed."""
    return load_outcome(path)


def _report(progress: Mapping[str, Any]) -> None:
    """Reports to the SLURM job that started the sweep, if it named a file; raises OSError."""
    if path := os.environ.get(SWEEP_FILE):
        write_atomically(Path(path), json.dumps(progress).encode())
