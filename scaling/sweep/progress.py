"""Shows the progress of a sweep: a live table on a terminal, otherwise one line per cell."""

import datetime
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from scaling.store.outcome import CellOutcome
from scaling.sweep.claims import Holder
from scaling.sweep.plan import CellTask, train_flops
from unitransformer.record.units import format_duration

SHOWN = 8  # newest finished cells in the table


@dataclass
class Progress:
    """Shows finished and running cells of all processes, and estimates the remaining time."""

    # Returns all tasks, and the outcomes of the finished ones.
    scan: Callable[[], tuple[Sequence[CellTask], dict[str, CellOutcome]]]
    holders: Callable[[], Mapping[str, Holder]]  # returns which process has claimed which cell
    stream: TextIO
    _: KW_ONLY
    axes: Collection[str]  # options that the label of a cell shows
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self._since_s = self.clock()
        self._running_here: str | None = None
        self._finished: list[tuple[CellTask, CellOutcome]] = []
        self._announced: set[tuple[str, float]] = set()  # running cells that were printed
        self._tasks: Sequence[CellTask] = ()
        self._done: dict[str, CellOutcome] = {}
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        self._tasks, self._done = self.scan()
        if self.stream.isatty():
            console = Console(file=self.stream)
            self._live = Live(console=console, get_renderable=self.table, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def cell_started(self, task: CellTask) -> None:
        self._running_here = task.name

    def cell_finished(self, task: CellTask, outcome: CellOutcome) -> None:
        self._running_here = None
        self._tasks, self._done = self.scan()
        self._add_finished(task, outcome)

    def refresh(self) -> bool:
        """Shows what other processes have finished or begun; returns whether any cell is left."""
        before = set(self._done)
        self._tasks, self._done = self.scan()
        for task in self._tasks:
            if task.name in self._done and task.name not in before:
                self._add_finished(task, self._done[task.name])
        if self._live is None:
            for task, holder in self._running():
                if (task.name, holder.since_s) not in self._announced:
                    self._announced.add((task.name, holder.since_s))
                    self._print(f"{task.cell.label(self.axes)}: running on {holder.host}")
        return len(self._done) < len(self._tasks)

    def _add_finished(self, task: CellTask, outcome: CellOutcome) -> None:
        self._finished.append((task, outcome))
        if self._live is None:
            detail = f": {outcome.reason}" if outcome.reason else f" in {outcome.elapsed_s:.1f} s"
            number = f"{len(self._done)}/{len(self._tasks)}"
            self._print(f"{number} {task.cell.label(self.axes)}: {outcome.status}{detail}")

    def _print(self, line: str) -> None:
        print(line, file=self.stream, flush=True)

    def _running(self) -> list[tuple[CellTask, Holder]]:
        holders = self.holders()
        return [(task, holders[task.name]) for task in self._tasks if task.name in holders]

    def remaining_s(self) -> float | None:
        """Estimates the seconds until all cells are finished; None until one has run.

        The estimate fits the cells that ended since this process began with a start-up time plus
        a time per FLOP, and assumes that as many cells run at once as since then.
        """
        left = [t for t in self._tasks if t.name not in self._done and t.config is not None]
        if not left:
            return 0.0
        ran = [
            (task.config, outcome)
            for task in self._tasks
            if task.config is not None
            and (outcome := self._done.get(task.name)) is not None
            and outcome.started_at is not None
            and _finished_s(outcome) > self._since_s
        ]
        now_s = self.clock()
        watched_s = now_s - self._since_s
        if not ran or watched_s <= 0:
            return None
        start_s = min(outcome.elapsed_s for _, outcome in ran)
        beyond_s = sum(outcome.elapsed_s - start_s for _, outcome in ran)
        per_flop_s = beyond_s / sum(train_flops(config) for config, _ in ran)
        running_s = {task.name: now_s - holder.since_s for task, holder in self._running()}
        needed_s = sum(
            max(0.0, start_s + per_flop_s * train_flops(t.config) - running_s.get(t.name, 0.0))
            for t in left
            if t.config
        )
        spent_s = sum(
            min(outcome.elapsed_s, _finished_s(outcome) - self._since_s) for _, outcome in ran
        )
        spent_s += sum(min(seconds, watched_s) for seconds in running_s.values())
        return needed_s * watched_s / spent_s

    def headline(self) -> str:
        """Returns the number of finished cells by status: "2 of 3 cells finished (2 ok)"."""
        statuses = sorted(Counter(outcome.status for outcome in self._done.values()).items())
        numbers = ", ".join(f"{number} {status}" for status, number in statuses) or "none"
        return f"{len(self._done)} of {len(self._tasks)} cells finished ({numbers})"

    def table(self) -> Table:
        """Returns the table of the newest finished cells and of all running cells."""
        title, left_s = self.headline(), self.remaining_s()
        if left_s is None:
            title += ", remaining time unknown"
        elif left_s > 0:
            title += f", about {format_duration(left_s)} left"
        table = Table(title=title, title_justify="left")
        for name in ("cell", "status", "time", "detail"):
            table.add_column(name, overflow="fold")
        for task, outcome in self._finished[-SHOWN:]:
            label, elapsed = task.cell.label(self.axes), f"{outcome.elapsed_s:.1f} s"
            table.add_row(label, outcome.status, elapsed, outcome.reason or "")
        for task, holder in self._running():
            label, elapsed = task.cell.label(self.axes), f"{self.clock() - holder.since_s:.0f} s"
            where = "here" if task.name == self._running_here else f"on {holder.host}"
            table.add_row(label, "running", elapsed, where)
        return table


def _finished_s(outcome: CellOutcome) -> float:
    assert outcome.finished_at is not None
    return datetime.datetime.fromisoformat(outcome.finished_at).timestamp()
