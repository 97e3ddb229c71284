"""Tests the progress of a sweep: finished cells, running cells, remaining time."""

import datetime
import fcntl
import io
import multiprocessing
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from scaling.store.outcome import CellOutcome
from scaling.sweep.claims import CLAIMS, Holder, claim, find_holders
from scaling.sweep.plan import CellTask
from scaling.sweep.progress import Progress
from tests.builders.sweeps import make_study, make_sweep, make_tasks

START_S = 1_000_000.0  # seconds since the epoch
AXES = ("precision", "batch-size")


def nobody() -> Mapping[str, Holder]:
    return {}


def make_even(count: int) -> list[CellTask]:
    """Cells of equal cost."""
    tasks = make_tasks(make_study(axes={"precision": "32-true"}, repeats=str(count)))
    assert len(tasks) == count
    return tasks


def end(task: CellTask, *, elapsed_s: float, at_s: float) -> CellOutcome:
    """The outcome of a task that ended `at_s` after the start."""
    at = datetime.datetime.fromtimestamp(START_S + at_s, datetime.UTC).isoformat()
    return CellOutcome(
        cell=task.cell.id,
        repeat=task.repeat,
        recipe="gpt",
        options=task.cell.options,
        command="",
        status="ok",
        elapsed_s=elapsed_s,
        started_at=at,
        finished_at=at,
    )


def left_s(
    tasks: Sequence[CellTask],
    outcomes: Sequence[CellOutcome],
    *,
    now_s: float,
    running_s: Mapping[str, float] | None = None,
) -> float | None:
    """The remaining seconds at `now_s` after the start; `running_s` are starts of running cells."""
    now = [START_S]
    holders = {
        name: Holder(host="other", process=1, since_s=START_S + since_s)
        for name, since_s in (running_s or {}).items()
    }
    done = {outcome.name: outcome for outcome in outcomes}
    progress = Progress(
        lambda: (tasks, done), lambda: holders, io.StringIO(), axes=AXES, clock=lambda: now[0]
    )
    now[0] += now_s
    progress.refresh()
    return progress.remaining_s()


def test_remaining_time_of_one_process_is_the_mean_cell_time_times_cells() -> None:
    tasks = make_even(6)
    ended = [end(task, elapsed_s=10, at_s=10 * n) for n, task in enumerate(tasks[:2], 1)]
    assert left_s(tasks, ended, now_s=20) == 40
    assert left_s(tasks, ended[:0], now_s=20) is None
    assert left_s(tasks[:2], ended, now_s=20) == 0


def test_cells_finished_by_other_processes_shorten_the_remaining_time() -> None:
    tasks = make_even(6)
    ended = [end(task, elapsed_s=10, at_s=10) for task in tasks[:2]]  # two at once
    assert left_s(tasks, ended, now_s=10) == 20


def test_cells_finished_before_the_start_do_not_count_for_the_pace() -> None:
    tasks = make_even(8)
    before = [end(task, elapsed_s=10, at_s=-10) for task in tasks[:4]]
    assert left_s(tasks, before, now_s=10) is None
    here = [end(tasks[4], elapsed_s=10, at_s=10)]
    assert left_s(tasks, [*before, *here], now_s=10) == 30
    # For a cell begun long before, only its time since the start counts.
    others = [end(tasks[5], elapsed_s=1000, at_s=5)]
    assert left_s([*tasks[4:6]], [*here, *others], now_s=10) == 0


def test_cells_running_elsewhere_count_as_partly_done() -> None:
    tasks = make_even(6)
    ended = [end(tasks[0], elapsed_s=10, at_s=10)]
    # Two processes: one cell ended after 10 s, one has been running since 0 s; three are left.
    assert left_s(tasks[:5], ended, now_s=10, running_s={tasks[1].name: 0}) == 15


# ---------------------------------------------------------------------------------- claims


def hold(folder: Path, name: str, expected: Connection) -> None:
    held = claim(folder, name)
    expected.send(held is not None)
    time.sleep(60)


def test_watching_shows_running_cells_and_claims_none(tmp_path: Path) -> None:
    actual, sender = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    other = context.Process(target=hold, args=(tmp_path, "a-1", sender))
    other.start()
    try:
        assert actual.recv()
        holders = find_holders(tmp_path)
        assert holders.keys() == {"a-1"}
        assert (holders["a-1"].host, holders["a-1"].process) == (socket.gethostname(), other.pid)
        assert 0 <= time.time() - holders["a-1"].since_s < 60
        assert claim(tmp_path, "a-1") is None
    finally:
        other.kill()
        other.join()
    # Its note remains, without a lock.
    assert list((tmp_path / CLAIMS).glob("*.runs"))
    assert find_holders(tmp_path) == {}
    held = claim(tmp_path, "a-1")
    assert held is not None
    held.close()
    assert not list((tmp_path / CLAIMS).glob("*.runs"))


def test_a_cell_being_watched_can_still_be_claimed(tmp_path: Path) -> None:
    note = tmp_path / CLAIMS / "a-1.runs"
    note.parent.mkdir()
    note.write_text("{}")  # left by a killed process
    with note.open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        held = claim(tmp_path, "a-1")
    assert held is not None
    assert find_holders(tmp_path).keys() == {"a-1"}
    held.close()


# ---------------------------------------------------------------------------------- shown


def test_progress_without_a_terminal_is_one_line_per_cell(tmp_path: Path) -> None:
    actual: Any = io.StringIO()
    one, _ = make_sweep(tmp_path / "s", make_tasks(make_study()))
    with Progress(one.scan, nobody, actual, axes=AXES) as progress:
        assert progress.remaining_s() is None
        one.work(progress)
        assert progress.remaining_s() == 0.0
    lines = actual.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "1/10 gpt, precision bf16-true, batch-size 8: ok in 1.0 s"
    assert re.search(r": oom-inferred: needs at least as much memory as \w{12}, which", lines[-1])


def test_the_terminal_table_shows_cells_running_here_and_elsewhere(tmp_path: Path) -> None:
    tasks = make_even(3)
    one, _ = make_sweep(tmp_path / "s", tasks)
    holders = {
        task.name: Holder(host="node3", process=1, since_s=START_S - 5) for task in tasks[:2]
    }
    progress = Progress(one.scan, lambda: holders, io.StringIO(), axes=AXES, clock=lambda: START_S)
    with progress:
        progress.cell_started(tasks[0])
        table = progress.table()
    assert str(table.title) == "0 of 3 cells finished (none), remaining time unknown"
    assert list(table.columns[1].cells) == ["running", "running"]
    assert list(table.columns[2].cells) == ["5 s", "5 s"]
    assert list(table.columns[3].cells) == ["here", "on node3"]


def test_watching_without_a_terminal_prints_running_cells_once() -> None:
    tasks, actual = make_even(2), io.StringIO()
    holders = {tasks[1].name: Holder(host="node3", process=1, since_s=START_S)}
    progress = Progress(lambda: (tasks, {}), lambda: holders, actual, axes=AXES)
    assert progress.refresh()
    assert progress.refresh()
    assert actual.getvalue() == "gpt, precision 32-true: running on node3\n"
    holders[tasks[1].name] = replace(holders[tasks[1].name], since_s=START_S + 9)  # started again
    progress.refresh()
    assert actual.getvalue().count("running on node3") == 2
