"""A sweep as it goes, for people: a table that moves on a terminal, a line a cell elsewhere."""

import datetime
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from scaling.store.outcome import Outcome
from scaling.sweep.claims import Holder
from scaling.sweep.plan import CellTask, train_flops
from unitransformer.record.units import duration

SHOWN = 8  # cells that have ended, the newest of them


class Progress:
    """What is done, what runs, what is left and when it will end, whoever does it.

    Args:
        look: all tasks, and the outcomes of those that are finished.
        holders: who has claimed which.
        clock: clock time.
    """

    def __init__(
        self,
        look: Callable[[], tuple[Sequence[CellTask], dict[str, Outcome]]],
        holders: Callable[[], Mapping[str, Holder]],
        stream: TextIO,
        *,
        axes: Collection[str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._look, self._holders, self._clock = look, holders, clock
        self._stream, self._axes = stream, axes
        self._since_s = clock()
        self._own: str | None = None  # the task that runs here
        self._ended: list[tuple[CellTask, Outcome]] = []
        self._seen: set[tuple[str, float]] = set()  # who was told to have begun what
        self._tasks: Sequence[CellTask] = ()
        self._done: dict[str, Outcome] = {}
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        self._refresh()
        if self._stream.isatty():
            console = Console(file=self._stream)
            self._live = Live(console=console, get_renderable=self.table, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def begins(self, task: CellTask) -> None:
        self._own = task.name

    def ended(self, task: CellTask, outcome: Outcome) -> None:
        self._own = None
        self._ended.append((task, outcome))
        self._refresh()
        if self._live is None:
            print(self._line(task, outcome), file=self._stream, flush=True)

    def looks_again(self) -> bool:
        """Take in what other processes have finished; whether anything is left."""
        before = set(self._done)
        self._refresh()
        for task in self._tasks:
            if task.name in self._done and task.name not in before:
                outcome = self._done[task.name]
                self._ended.append((task, outcome))
                if self._live is None:
                    print(self._line(task, outcome), file=self._stream, flush=True)
        if self._live is None:
            self._tell_begun()
        return len(self._done) < len(self._tasks)

    def _tell_begun(self) -> None:
        for task, holder in self._running():
            if (task.name, holder.since_s) not in self._seen:
                self._seen.add((task.name, holder.since_s))
                told = f"{task.cell.label(self._axes)}: runs on {holder.host}"
                print(told, file=self._stream, flush=True)

    def _running(self) -> list[tuple[CellTask, Holder]]:
        holders = self._holders()
        return [(task, holders[task.name]) for task in self._tasks if task.name in holders]

    def _refresh(self) -> None:
        self._tasks, self._done = self._look()

    def _line(self, task: CellTask, outcome: Outcome) -> str:
        told = f": {outcome.reason}" if outcome.reason else f" in {outcome.elapsed_s:.1f} s"
        number = f"{len(self._done)}/{len(self._tasks)}"
        return f"{number} {task.cell.label(self._axes)}: {outcome.status}{told}"

    def left_s(self) -> float | None:
        """Seconds until all is done: by the FLOPs left, at the seconds a FLOP and a start have
        taken, and as many cells at once as there were since this began; None until one has run."""
        left = [t for t in self._tasks if t.name not in self._done and t.config is not None]
        if not left:
            return 0.0
        ran = [pair for pair in self._ran_since() if pair[0].config is not None]
        now_s = self._clock()
        if not ran or now_s <= self._since_s:
            return None
        # Small cells are mostly start-up: a part of every cell, a part of every FLOP.
        start_s = min(outcome.elapsed_s for _, outcome in ran)
        beyond_s = sum(outcome.elapsed_s - start_s for _, outcome in ran)
        per_flop = beyond_s / sum(train_flops(task.config) for task, _ in ran if task.config)
        begun_s = {task.name: now_s - holder.since_s for task, holder in self._running()}
        needed_s = sum(
            max(0.0, start_s + per_flop * train_flops(t.config) - begun_s.get(t.name, 0.0))
            for t in left
            if t.config
        )
        spent_s = sum(
            min(outcome.elapsed_s, _finished_s(outcome) - self._since_s) for _, outcome in ran
        )
        spent_s += sum(min(each_s, now_s - self._since_s) for each_s in begun_s.values())
        return needed_s * (now_s - self._since_s) / spent_s

    def _ran_since(self) -> list[tuple[CellTask, Outcome]]:
        """Cells that were run, by anybody, and have ended since this began."""
        done = [(task, self._done[task.name]) for task in self._tasks if task.name in self._done]
        return [
            (task, outcome)
            for task, outcome in done
            if outcome.started_at is not None and _finished_s(outcome) > self._since_s
        ]

    def table(self) -> Table:
        """The whole picture, now."""
        statuses = Counter(outcome.status for outcome in self._done.values())
        told = ", ".join(f"{number} {status}" for status, number in sorted(statuses.items()))
        left = self.left_s()
        end = "end not known yet" if left is None else f"about {duration(left)} left"
        table = Table(
            title=f"{len(self._done)} of {len(self._tasks)} done ({told or 'none'}), {end}",
            title_justify="left",
        )
        for name in ("cell", "status", "time", "what"):
            table.add_column(name, overflow="fold")
        for task, outcome in self._ended[-SHOWN:]:
            seconds = f"{outcome.elapsed_s:.1f} s"
            table.add_row(
                task.cell.label(self._axes), outcome.status, seconds, outcome.reason or ""
            )
        for task, holder in self._running():
            where = "here" if task.name == self._own else f"on {holder.host}"
            seconds = f"{self._clock() - holder.since_s:.0f} s"
            table.add_row(task.cell.label(self._axes), "running", seconds, where)
        return table


def _finished_s(outcome: Outcome) -> float:
    """Clock time."""
    assert outcome.finished_at is not None
    return datetime.datetime.fromisoformat(outcome.finished_at).timestamp()
