"""Runs `python -m scaling trend`: prints and draws the history of each cell."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from scaling.comparison.trend import MIN_RECORDS, Change, History, find_histories
from scaling.store.reader import load_store
from unitransformer.cli import suggest
from unitransformer.files import check_writable, write_atomically
from unitransformer.record.units import format_count, format_ms

MAX_LEFT_OUT = 5  # lines
MAX_PANELS = 8  # of the plot
KINDS = (".png", ".svg")
NOT_A_GATE = (
    "For looking, not a gate: these records were taken at different times, and the exit code is 0 "
    "whatever they show. `python -m scaling compare` measures whether a change is real."
)


def run_trend(given: Any) -> int:
    """Prints the histories and draws them; returns 0.

    Raises:
        ValueError: a bad option, or no records of which a history can be made.
    """
    if given.plot is not None:
        if given.plot.suffix not in KINDS:
            raise ValueError(f"plot {given.plot}: the name must end in {' or '.join(KINDS)}")
        check_writable("plot", given.plot, is_folder=False)
    store = load_store(given.folders, relative_to=Path.cwd())
    histories, left_out = find_histories(store.successful_runs)
    left_out += [f"{name}: {why}" for name, why in store.failures.items()]
    left_out += [f"{file.name}: {file.reason}" for file in store.left_out]
    if not histories:
        why = f"; {left_out[0]}" if left_out else ""
        folders = " ".join(map(str, given.folders))
        raise ValueError(f"{folders} holds no run record with a steady state{why}")
    if given.cell is not None:
        histories = _select(histories, given.cell)
    shown = [history for history in histories if history.can_change]
    blocks = [render(history) for history in shown]
    if short := [history for history in histories if not history.can_change]:
        blocks.append(render_short(short))
    print("\n\n".join([*blocks, NOT_A_GATE]))
    if left_out:
        print(f"\n{format_count(len(left_out), 'file')} left out:")
        print("\n".join(f"- {line}" for line in left_out[:MAX_LEFT_OUT]))
        if len(left_out) > MAX_LEFT_OUT:
            print(f"- and {len(left_out) - MAX_LEFT_OUT} more")
    if given.plot is not None:
        from scaling.comparison.trend_plot import draw_histories
        from unitransformer.plots import figure_bytes

        figure = draw_histories((shown or histories)[:MAX_PANELS])
        content = figure_bytes(figure, "svg" if given.plot.suffix == ".svg" else "png")
        write_atomically(given.plot, content)
        more = len(shown or histories) - MAX_PANELS
        rest = f" of the longest {MAX_PANELS} histories; --cell selects others" if more > 0 else ""
        print(f"\nplot: {given.plot}{rest}")
    return 0


def _select(histories: Sequence[History], text: str) -> list[History]:
    chosen = [history for history in histories if text in history.cell or text in history.title]
    if not chosen:
        known = dict.fromkeys(history.cell for history in histories)
        raise ValueError(f"cell {text} is in no hash or title; {suggest(text, known)}")
    return chosen


def render(history: History) -> str:
    """Returns a heading, a table with a row for each change, and what is too short for one."""
    points = history.points
    days = f"{points[0].started_at:%Y-%m-%d} to {points[-1].started_at:%Y-%m-%d}"
    commits = format_count(len({point.commit for point in points}), "commit")
    lines = [
        f"{history.title} (cell {history.cell})",
        f"{format_count(len(points), 'record')} of {commits}, {days}, median {history.clock} of a "
        f"step, torch {points[-1].versions.get('torch', 'unknown')} now, {history.machine}",
    ]
    if history.changes:
        rows = [_row(history, change) for change in history.changes]
        lines += ["", tabulate(rows, headers="keys", disable_numparse=True)]
    elif not history.too_few:
        median = statistics.median(point.seconds for point in points)
        lines.append(f"no change point; median {format_ms(median)}")
    lines += [f"{line}: no search" for line in history.too_few]
    return "\n".join(lines)


def render_short(histories: Sequence[History]) -> str:
    """Returns what histories without a change lack, in a few lines."""
    few = format_count(len(histories), "history has", "histories have")
    lines = [f"{few} fewer than {MIN_RECORDS} records, which a change point needs:"]
    for history in histories[:MAX_LEFT_OUT]:
        number = format_count(len(history.points), "record")
        lines.append(f"- {history.title} (cell {history.cell}): {number}")
    if len(histories) > MAX_LEFT_OUT:
        lines.append(f"- and {len(histories) - MAX_LEFT_OUT} more")
    return "\n".join(lines)


def _row(history: History, change: Change) -> dict[str, str]:
    last, first = history.points[change.index - 1], history.points[change.index]
    low, high = history.bounds[history.bounds.index(change.index) - 1], change.index
    end = history.bounds[history.bounds.index(change.index) + 1]
    return {
        "change": change.what,
        "before": f"{format_ms(change.before_s)} (n={high - low})",
        "after": f"{format_ms(change.after_s)} (n={end - high})",
        "ratio": f"{change.ratio:.3f}",
        "p": "" if change.p_value is None else f"{change.p_value:.3f}",
        "commits": f"{last.commit}..{first.commit}",
        "date": f"{first.started_at:%Y-%m-%d}",
    }
