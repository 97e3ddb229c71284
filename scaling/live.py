"""A sweep as it goes, for people: a table that moves on a terminal, a line a cell elsewhere."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from scaling.markdown import duration
from scaling.order import train_flops
from scaling.outcomes import Outcome
from scaling.tasks import Task

SHOWN = 8  # cells that have ended, the newest of them


class Progress:
    """What is done, what runs, what is left and when it will end."""

    def __init__(
        self,
        look: Callable[[], tuple[Sequence[Task], dict[str, Outcome]]],
        stream: TextIO,
        *,
        axes: Collection[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look, self._clock, self._stream, self._axes = look, clock, stream, axes
        self._running: tuple[Task, float] | None = None
        self._ended: list[tuple[Task, Outcome]] = []
        self._tasks: Sequence[Task] = ()
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

    def begins(self, task: Task) -> None:
        self._running = (task, self._clock())

    def ended(self, task: Task, outcome: Outcome) -> None:
        self._running = None
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
        return len(self._done) < len(self._tasks)

    def _refresh(self) -> None:
        self._tasks, self._done = self._look()

    def _line(self, task: Task, outcome: Outcome) -> str:
        told = f": {outcome.reason}" if outcome.reason else f" in {outcome.elapsed_s:.1f} s"
        number = f"{len(self._done)}/{len(self._tasks)}"
        return f"{number} {task.cell.label(self._axes)}: {outcome.status}{told}"

    def left_s(self) -> float | None:
        """Seconds until all is done: by the FLOPs left, at the seconds a FLOP and a start took so
        far; None until a cell has run."""
        ran = [(t, o) for t, o in self._ended if o.started_at is not None and t.config is not None]
        left = [t for t in self._tasks if t.name not in self._done and t.config is not None]
        if not left:
            return 0.0
        if not ran:
            return None
        spent_s = sum(outcome.elapsed_s for _, outcome in ran)
        # Small cells are mostly start-up: a part of every cell, a part of every FLOP.
        start_s = min(outcome.elapsed_s for _, outcome in ran)
        flops = sum(train_flops(task.config) for task, _ in ran if task.config)
        per_flop = max(0.0, spent_s - start_s * len(ran)) / flops
        return sum(start_s + per_flop * train_flops(t.config) for t in left if t.config)

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
        if self._running is not None:
            task, since = self._running
            table.add_row(
                task.cell.label(self._axes), "running", f"{self._clock() - since:.0f} s", ""
            )
        return table
