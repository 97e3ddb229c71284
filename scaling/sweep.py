"""A sweep: the cells of a study go in; every one ends with an outcome in the folder.

The folder is the store. What is finished is not done again, whoever asks: the same command goes on
where another was stopped, and several of them share the work. A cell is claimed by a lock that ends
with its holder, and finished by one file that appears whole.
"""

import contextlib
import datetime
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from scaling.inference import find_cause, is_checked_again, unrefuted
from scaling.markdown import count
from scaling.outcomes import FILE, Outcome, load_outcome, write_outcome
from scaling.processes import Ended, Runner, last_words
from scaling.study import Study
from scaling.tasks import Task
from unitransformer.config import RunConfig
from unitransformer.records import PROGRESS, Record, Status, load_record, write_atomically
from unitransformer.sealed import check_seals, read_json, seal
from unitransformer.stop_signals import EXIT_CODE

STUDY = "study.json"
CELLS, CLAIMS = "cells", "claims"
LOG = "log.txt"
RUN_FOLDER = "UNITRANSFORMER_RUN_FOLDER"  # tells a recipe where its run goes
# All cells of a sweep read and write one: entries are named by their content and appear whole, so a
# cell that is killed leaves none half written.
COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
LAST_LINES = 12
STOP_S = 1.0  # that a signal sent to the cell may take to reach this process
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a cell may take."""

    limit_s: float
    memory_limit_bytes: int | None = None  # None: the machine's
    recheck: float = 0.1  # share of the cells settled by another's lack of memory that run anyway


class Watch(Protocol):
    """Is told what a sweep does."""

    def begins(self, task: Task) -> None: ...
    def ended(self, task: Task, outcome: Outcome) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What became of all cells, and what this process spent on them."""

    statuses: Mapping[str, int]
    own: Mapping[str, int]  # of those that this process has run
    left: int  # for other processes, which have claimed them or will
    elapsed_s: float
    in_cells_s: float  # of `elapsed_s`, from start to end of cells

    def in_words(self) -> str:
        told = ", ".join(f"{count_} {status}" for status, count_ in self.statuses.items())
        left = f", {self.left} left to other processes" if self.left else ""
        return f"{count(sum(self.statuses.values()), 'cell')} finished ({told}){left}"


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
Agenda = Callable[[Mapping[str, Outcome]], Sequence[Task]]


class Finished:
    """Outcomes in the folder of a sweep. A file is read again only when it has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / CELLS
        self._read: dict[str, tuple[tuple[int, int], Outcome]] = {}

    def of(self, tasks: Sequence[Task]) -> dict[str, Outcome]:
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


# ---------------------------------------------------------------------------------- sweep


@dataclass(kw_only=True)
class Sweep:
    """Works on a folder until nothing is left to do."""

    folder: Path
    agenda: Agenda
    limits: Limits
    runner: Callable[[Task], Runner]
    retry: frozenset[str] = frozenset()  # statuses that are tried again
    retry_before: str | None = None  # if they ended before this; None: before this process began
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._finished = Finished(self.folder)
        self._since = self.retry_before or _now()
        self._in_cells_s = 0.0

    def work(self, watch: Watch, *, max_cells: int | None = None) -> Summary:
        """Finish all tasks that nobody else has claimed, or so many of those that have to run.

        Raises:
            OSError: the disk is full or was made read-only; what is finished stays.
            KeyboardInterrupt: asked to stop; the cell under way is ended and not finished.
        """
        start_s = self.clock()
        own: list[Outcome] = []
        while (max_cells is None or len(own) < max_cells) and (claimed := self._claim()):
            task, lock = claimed
            try:
                watch.begins(task)
                outcome = self._finish(task)
                watch.ended(task, outcome)
            finally:
                lock.release()
            if outcome.started_at is not None:
                own.append(outcome)
        tasks, done = self.look()
        statuses = Counter(outcome.status for outcome in done.values())
        return Summary(
            statuses=dict(sorted(statuses.items(), key=lambda item: (item[0] != "ok", item[0]))),
            left=len(tasks) - len(done),
            own=Counter(outcome.status for outcome in own),
            elapsed_s=self.clock() - start_s,
            in_cells_s=self._in_cells_s,
        )

    def look(self) -> tuple[Sequence[Task], dict[str, Outcome]]:
        """All tasks that are known so far, and the outcomes of those that are finished."""
        done: dict[str, Outcome] = {}
        while True:
            tasks = self.agenda(done)
            found = self._done(tasks)
            if found.keys() == done.keys():
                return tasks, found
            done = found

    def _done(self, tasks: Sequence[Task]) -> dict[str, Outcome]:
        """Those to be tried again are not done, nor those settled by a cell that is refuted."""
        outcomes = self._finished.of(tasks)
        causes = _causes(outcomes)
        return {
            name: outcome
            for name, outcome in outcomes.items()
            if not self._is_tried_again(outcome)
            and (
                outcome.status != "oom-inferred"
                or outcome.config is None
                or find_cause(outcome.config, causes) is not None
            )
        }

    def _is_tried_again(self, outcome: Outcome) -> bool:
        return outcome.status in self.retry and (outcome.finished_at or "") < self._since

    def _claim(self) -> tuple[Task, FileLock] | None:
        """The next task that is neither finished nor claimed, and the claim."""
        tasks, done = self.look()
        places = self.folder / CLAIMS
        places.mkdir(exist_ok=True)
        for task in tasks:
            if task.name in done:
                continue
            lock = FileLock(places / f"{task.name}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            if task.name not in self._done([task]):  # nobody has finished it meanwhile
                return task, lock
            lock.release()
        return None

    def _finish(self, task: Task) -> Outcome:
        outcome = self._settled(task) or self._run(task)
        place = self.folder / CELLS / task.name
        if outcome.started_at is None:  # nothing has run: nothing of an earlier attempt stays
            shutil.rmtree(place, ignore_errors=True)
        outcome = replace(outcome, finished_at=_now())
        write_outcome(outcome, place)
        return outcome

    def _settled(self, task: Task) -> Outcome | None:
        """The outcome of a task that need not run."""
        if task.config is None:
            return self._outcome(task, status="refused", reason=task.refusal)
        tasks, _ = self.look()
        cause = find_cause(task.config, _causes(self._finished.of(tasks)))
        if cause is None or is_checked_again(task.cell.id, self.limits.recheck):
            return None
        return self._outcome(
            task,
            status="oom-inferred",
            reason=f"needs at least as much memory as {cause}, which ran out of it",
            inferred_from=cause,
        )

    def _run(self, task: Task) -> Outcome:
        place = (self.folder / CELLS / task.name).absolute()
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        started_at, start_s = _now(), self.clock()
        killed_before = kernel_kills()
        try:
            ended = self.runner(task)(
                task.cell.recipe,
                task.cell.arguments,
                log=place / LOG,
                limit_s=self.limits.limit_s,
                memory_limit_bytes=self.limits.memory_limit_bytes,
                variables={
                    RUN_FOLDER: str(place),
                    COMPILE_CACHE: os.environ.get(
                        COMPILE_CACHE, str(self.folder.absolute() / "compile-cache")
                    ),
                },
            )
        except RuntimeError as error:  # the worker itself has ended; the next cell starts another
            ended = Ended(exit_code=1, elapsed_s=self.clock() - start_s)
            (place / LOG).write_text(f"error: {error}\n")
        finally:
            self._in_cells_s += self.clock() - start_s
        record = _read_record(place)
        if _is_stopped(ended, record):
            time.sleep(STOP_S)
        status = judge(ended, record, killed_by_kernel=kernel_kills() > killed_before)
        if status != "ok":
            _check_disk(place)
        lines = () if status == "ok" else self._last_lines(place / LOG, record)
        _tidy(place)
        return self._outcome(
            task,
            status=status,
            reason=_reason(status, ended, record, lines, self.limits),
            exit_code=ended.exit_code,
            elapsed_s=ended.elapsed_s,
            started_at=started_at,
            last_lines=lines,
            record=None if record is None else record[0].name,
        )

    def _last_lines(
        self, log: Path, record: tuple[Path, Mapping[str, Any]] | None
    ) -> tuple[str, ...]:
        """Of the rank that failed first, by its record; else of what the cell said. No place of
        this machine is in them."""
        said: Sequence[str] = []
        if record is not None:
            said = (record[1].get("error") or {}).get("last_lines") or []
        if not said:
            with contextlib.suppress(OSError):
                said = log.read_text(errors="replace").splitlines()
        here = f"{self.folder.absolute()}/"
        lines = [str(line).replace(here, "").rstrip() for line in said]
        return tuple(line for line in lines if line.strip())[-LAST_LINES:]

    def _outcome(self, task: Task, *, status: Status, **facts: Any) -> Outcome:
        return Outcome(
            cell=task.cell.id,
            repeat=task.repeat,
            recipe=task.cell.recipe,
            options=dict(task.cell.options),
            command=task.cell.command,
            status=status,
            memory_limit_bytes=self.limits.memory_limit_bytes,
            config=task.config,
            **facts,
        )


def _causes(outcomes: Mapping[str, Outcome]) -> dict[str, RunConfig]:
    """Configs that ran out of memory, by their cell, those aside that a cell which ran refutes."""
    told = [(outcome, outcome.config) for outcome in outcomes.values() if outcome.config]
    too_large = {outcome.cell: config for outcome, config in told if outcome.status == "oom"}
    return unrefuted(too_large, [config for outcome, config in told if outcome.status == "ok"])


# ---------------------------------------------------------------------------------- verdict


def judge(
    ended: Ended, record: tuple[Path, Record] | None, *, killed_by_kernel: bool = False
) -> Status:
    """The status of a cell by how its process ended and what its record says; never by its words.

    Args:
        killed_by_kernel: whether the system killed some process for want of memory meanwhile,
            which is this one's end only if it was killed.
    """
    if ended.ending != "ended":
        return ended.ending
    status: Status | None = None if record is None else record[1]["status"]
    if ended.exit_code == 0 and status == "ok":
        return "ok"
    if status in ("oom", "preempted"):
        return status
    error = None if record is None else record[1]["error"]
    was_killed = ended.exit_code == -signal.SIGKILL or (error and error["type"] == "SIGKILL")
    if killed_by_kernel and was_killed:
        return "oom"
    if ended.exit_code == 2:
        return "refused"
    return "preempted" if ended.exit_code in STOPPED else "crashed"


STOPPED = (EXIT_CODE, 128 + 2, 128 + 15, -2, -15)  # by SIGINT or SIGTERM, or saved and left


def _is_stopped(ended: Ended, record: tuple[Path, Record] | None) -> bool:
    """Whether a signal ended the cell, or one of its ranks. One that a batch system sends to every
    process is on its way to this one too, and then the cell is given back, without an outcome."""
    code, error = ended.exit_code, None if record is None else record[1]["error"]
    is_rank = error is not None and str(error["type"]).startswith("SIG")
    return code is not None and (code in STOPPED or code < 0 or is_rank)


def kernel_kills(place: Path = Path("/proc/vmstat")) -> int:
    """Processes that the system has killed for want of memory since it started; 0 if it does not
    tell."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(dict(line.split() for line in place.read_text().splitlines())["oom_kill"])
    return 0


def _reason(
    status: Status,
    ended: Ended,
    record: tuple[Path, Record] | None,
    lines: Sequence[str],
    limits: Limits,
) -> str | None:
    if status == "ok":
        return None
    if ended.ending == "timeout":
        return f"did not end within {limits.limit_s:g} s"
    if ended.ending == "oom":
        assert limits.memory_limit_bytes is not None
        return f"passed its memory limit of {limits.memory_limit_bytes / 2**30:.3g} GiB"
    error = None if record is None else record[1]["error"]
    if error is not None:
        return f"rank {error['rank']}: {error['type']}: {error['message']}".splitlines()[0]
    if ended.exit_code == 0:
        return "it ended well and left no record that can be read"
    return last_words(lines, ended.exit_code)


def _check_disk(place: Path) -> None:
    """Raises OSError where a failure may be the disk's: nothing can be written beside it."""
    probe = place / ".probe"
    try:
        probe.write_bytes(bytes(2**20))
    finally:
        probe.unlink(missing_ok=True)


def _read_record(place: Path) -> tuple[Path, Record] | None:
    """The record that a run has left in its folder."""
    for path in sorted(place.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            return path, load_record(path)
    return None


def _tidy(place: Path) -> None:
    """Keep record and log; curves are in the record."""
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    (place / PROGRESS).unlink(missing_ok=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
