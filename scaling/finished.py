"""What is finished in the folder of a sweep, and which lack of memory settles other cells."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling.inference import first_to_check, is_checked_again, needs_at_least, unrefuted
from scaling.outcomes import FILE, Outcome, load_outcome
from scaling.tasks import Task
from unitransformer.config import RunConfig

CELLS = "cells"


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


class Causes:
    """Configs that ran out of memory, by their cell, those aside that a cell which ran refutes.

    What did not fit the memory of one machine tells nothing of another; what passed the limit that
    all cells of a sweep have does.
    """

    def __init__(self, outcomes: Collection[Outcome]) -> None:
        self._outcomes = outcomes
        self._known: dict[str, Mapping[str, RunConfig]] = {}

    def on(self, host: Mapping[str, Any] | None) -> Mapping[str, RunConfig]:
        """Those that count on machines of one kind."""
        key = json.dumps(host, sort_keys=True)
        if key not in self._known:
            told = [(each, each.config) for each in self._outcomes if each.config is not None]
            self._known[key] = {
                **_unrefuted([(o, c) for o, c in told if o.status == "ok" or _passed_limit(o)]),
                **_unrefuted([(o, c) for o, c in told if o.host == host and not _passed_limit(o)]),
            }
        return self._known[key]


def _passed_limit(outcome: Outcome) -> bool:
    return outcome.status == "oom" and outcome.exit_code is None


def _unrefuted(told: Sequence[tuple[Outcome, RunConfig]]) -> dict[str, RunConfig]:
    too_large = {outcome.cell: config for outcome, config in told if outcome.status == "oom"}
    return unrefuted(too_large, [config for outcome, config in told if outcome.status == "ok"])


def is_check(
    task: Task,
    cause: tuple[str, RunConfig],
    tasks: Sequence[Task],
    done: Mapping[str, Outcome],
    share: float,
) -> bool:
    """Whether a task that another cell settles runs all the same: so do a share of them, and of all
    that one cause settles at least one, unless the share is 0."""
    if share == 0 or is_checked_again(task.cell.id, share):
        return share > 0
    cell, config = cause
    settled = [
        each
        for each in tasks
        if each.config is not None and each.cell.id != cell and needs_at_least(each.config, config)
    ]
    seen = (done.get(each.name) for each in settled)
    if not settled or any(o is not None and o.status in ("ok", "oom") for o in seen):
        return False
    return task.cell.id == first_to_check({each.cell.id for each in settled})
