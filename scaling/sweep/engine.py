"""A sweep: the cells of a study go in; every one ends with an outcome in the folder.

The folder is the store. What is finished is not done again, whoever asks: the same command goes on
where another was stopped, and several of them share the work. A cell is claimed by a lock that ends
with its holder, and finished by one file that appears whole.
"""

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
from scaling.store.outcome import CELLS, FILE, STUDY, Outcome, load_outcome, write_outcome
from scaling.sweep.claims import Claim, claim
from scaling.sweep.memory_inference import OomCauses, find_cause, is_recheck, root_cause
from scaling.sweep.plan import CellTask
from scaling.sweep.run_cell import Limits, now, outcome_without_run, run_cell
from scaling.sweep.study import Study
from unitransformer.files import write_atomically
from unitransformer.record.seals import check_seals, read_json, seal
from unitransformer.record.units import count

SCHEMA = 1


class SweepObserver(Protocol):
    """Is told what a sweep does."""

    def begins(self, task: CellTask) -> None: ...
    def ended(self, task: CellTask, outcome: Outcome) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """What became of all cells, and what this process spent on them."""

    statuses: Mapping[str, int]
    own: Mapping[str, int]  # of those that this process has run
    left: int  # for other processes, which have claimed them or will
    checked: int  # cells that another settles and that ran all the same
    refuted: int  # of those, the ones that fitted
    elapsed_s: float
    in_cells_s: float  # of `elapsed_s`, from start to end of cells

    def in_words(self) -> str:
        told = ", ".join(f"{count_} {status}" for status, count_ in self.statuses.items())
        left = f", {self.left} left to other processes" if self.left else ""
        checked = ""
        if self.checked:
            checked = f"; {count(self.checked, 'inferred lack')} of memory checked by a run, "
            checked += f"{self.refuted} refuted"
        return f"{count(sum(self.statuses.values()), 'cell')} finished ({told}){left}{checked}"


# ---------------------------------------------------------------------------------- folder


def open_folder(
    folder: Path, study: Study, limits: Limits, *, find_max_batch: int | None = None
) -> None:
    """Make the folder of a sweep, or find the same sweep there.

    Raises:
        ValueError: it holds another sweep, or files of something else.
        OSError: it cannot be written.
    """
    own = {
        "schema": SCHEMA,
        "kind": "study",
        "study": study.as_dict(),
        "memory_limit_bytes": limits.memory_limit_bytes,
        "find_max_batch": find_max_batch,
    }
    path = folder / STUDY
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{STUDY}.lock"):
        if not path.exists():
            # A sweep that was killed just here has left the file's beginning.
            ours = (f"{STUDY}.lock", f".{STUDY}.")
            if not all(entry.name.startswith(ours) for entry in folder.iterdir()):
                raise ValueError(f"out {folder} holds something else; choose an empty folder")
            write_atomically(path, json.dumps(seal(own), indent=1).encode())
            return
        there = read_json(path)
        if not isinstance(there, dict):
            raise ValueError(f"{path}: not the study of a sweep; choose another --out")
        check_seals(there, str(path))
    for name in ("schema", "memory_limit_bytes", "find_max_batch", "study"):
        if there.get(name) != own[name]:
            told = _first_difference(there.get(name), own[name], name)
            raise ValueError(
                f"out {folder} holds another sweep: {told}; give the same, or another --out"
            )


def _first_difference(there: Any, here: Any, name: str) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            if there.get(key) != here.get(key):
                return _first_difference(there.get(key), here.get(key), f"{name}.{key}")
    return f"{name} is {json.dumps(there)} there and {json.dumps(here)} here"


# What is to be done, in its order, given what is finished: a search decides as it goes.
Agenda = Callable[[Mapping[str, Outcome]], Sequence[CellTask]]

# ---------------------------------------------------------------------------------- sweep


@dataclass(kw_only=True)
class Sweep:
    """Works on a folder until nothing is left to do."""

    folder: Path
    agenda: Agenda
    limits: Limits
    runner: Callable[[CellTask], Runner]
    host: Mapping[str, Any] | None = None  # what this machine is, as outcomes tell it
    retry: frozenset[str] = frozenset()  # statuses that are tried again
    retry_before: str | None = None  # if they ended before this; None: before this process began
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._finished = OutcomeCache(self.folder)
        self._since = self.retry_before or now()
        self._in_cells_s = 0.0

    def work(self, watch: SweepObserver, *, max_cells: int | None = None) -> SweepSummary:
        """Finish all tasks that nobody else has claimed, or so many of those that have to run.

        Raises:
            OSError: the disk is full or was made read-only; what is finished stays.
            KeyboardInterrupt: asked to stop; the cell under way is ended and not finished.
        """
        start_s = self.clock()
        own: list[Outcome] = []
        while (max_cells is None or len(own) < max_cells) and (claimed := self._claim()):
            task, held = claimed
            try:
                watch.begins(task)
                outcome = self._finish(task)
                watch.ended(task, outcome)
            finally:
                held.release()
            if outcome.started_at is not None:
                own.append(outcome)
        tasks, done = self.look()
        statuses = Counter(outcome.status for outcome in done.values())
        return SweepSummary(
            statuses=dict(sorted(statuses.items(), key=lambda item: (item[0] != "ok", item[0]))),
            left=len(tasks) - len(done),
            checked=sum(outcome.checks is not None for outcome in done.values()),
            refuted=sum(o.checks is not None and o.status == "ok" for o in done.values()),
            own=Counter(outcome.status for outcome in own),
            elapsed_s=self.clock() - start_s,
            in_cells_s=self._in_cells_s,
        )

    def look(self) -> tuple[Sequence[CellTask], dict[str, Outcome]]:
        """All tasks that are known so far, and the outcomes of those that are finished."""
        done: dict[str, Outcome] = {}
        while True:
            tasks = self.agenda(done)
            found = self._done(tasks)
            if found.keys() == done.keys():
                return tasks, found
            done = found

    def _done(self, tasks: Sequence[CellTask]) -> dict[str, Outcome]:
        """Those to be tried again are not done, nor those settled by a cell that is refuted."""
        outcomes = self._kept(tasks)
        causes = OomCauses(outcomes.values())
        return {
            name: outcome
            for name, outcome in outcomes.items()
            if outcome.status != "oom-inferred"
            or outcome.config is None
            or find_cause(outcome.config, causes.on(outcome.host)) is not None
        }

    def _kept(self, tasks: Sequence[CellTask]) -> dict[str, Outcome]:
        """Outcomes, those aside that are tried again: they settle nothing meanwhile."""
        return {
            name: outcome
            for name, outcome in self._finished.of(tasks).items()
            if not self._is_tried_again(outcome)
        }

    def _is_tried_again(self, outcome: Outcome) -> bool:
        return outcome.status in self.retry and (outcome.finished_at or "") < self._since

    def _claim(self) -> tuple[CellTask, Claim] | None:
        """The next task that is neither finished nor claimed, and the claim."""
        tasks, done = self.look()
        for task in tasks:
            if task.name in done or (claimed := claim(self.folder, task.name)) is None:
                continue
            if task.name not in self._done([task]):  # nobody has finished it meanwhile
                return task, claimed
            claimed.release()
        return None

    def _finish(self, task: CellTask) -> Outcome:
        place = self.folder / CELLS / task.name
        cause, is_run = self._cause(task)
        if is_run:
            runner = self._timed(self.runner(task))
            outcome = replace(run_cell(task, runner, self.folder, self.limits), checks=cause)
        else:
            outcome = outcome_without_run(task, cause)
            shutil.rmtree(place, ignore_errors=True)  # nothing of an earlier attempt stays
        outcome = replace(
            outcome,
            host=self.host,
            memory_limit_bytes=self.limits.memory_limit_bytes,
            finished_at=now(),
        )
        write_outcome(outcome, place)
        return outcome

    def _cause(self, task: CellTask) -> tuple[str | None, bool]:
        """The cell whose lack of memory settles a task, and whether the task runs all the same."""
        if task.config is None:
            return None, False
        tasks, _ = self.look()
        done = self._kept(tasks)
        causes = OomCauses(done.values()).on(self.host)
        cause = root_cause(task.config, causes)
        before = self._finished.of([task]).get(task.name)
        if cause is None or (before is not None and self._is_tried_again(before)):
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
    """Outcomes in the folder of a sweep. A file is read again only when it has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / CELLS
        self._read: dict[str, tuple[tuple[int, int], Outcome]] = {}

    def of(self, tasks: Sequence[CellTask]) -> dict[str, Outcome]:
        """By the name of the task; an outcome that is damaged counts as none."""
        return {task.name: found for task in tasks if (found := self._load(task.name)) is not None}

    def _load(self, name: str) -> Outcome | None:
        path = self.folder / name / FILE
        try:
            stat = path.stat()
            state = (stat.st_mtime_ns, stat.st_ino)
            if name not in self._read or self._read[name][0] != state:
                self._read[name] = (state, load_outcome(path))
        except (OSError, ValueError):
            return None
        return self._read[name][1]
