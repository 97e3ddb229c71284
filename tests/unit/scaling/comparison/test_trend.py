"""Histories of cells: which records belong together, and where their step time changed."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from scaling.__main__ import main
from scaling.comparison.trend import MIN_RECORDS, History, find_change_points, find_histories
from scaling.comparison.trend_command import render, render_short
from scaling.comparison.trend_plot import draw_histories
from scaling.store.run import Run
from tests.builders.records import HOST, make_crashed, make_record, make_run
from tests.builders.sweeps import write_hung_cell
from unitransformer.plots import figure_bytes
from unitransformer.record.schema import write_record

NEWER = {"python": "3.11.7", "torch": "2.14.1"}


def _run(day: int, step_s: float = 0.1, **changes: Any) -> Run:
    """A clean run of the January day `day`, whose commit is named after it."""
    record = make_record(
        step_s=[0.5, 0.3] + [step_s] * 10,
        started_at=f"2026-01-{day:02d}T00:00:00+00:00",
        code={"commit": f"c{day:02d}" + "0" * 37, "is_dirty": False},
    )
    return make_run(record | changes, name=f"runs/{day}.json")


def _series(num_before: int, num_after: int, *, ratio: float) -> list[Run]:
    rng = random.Random(0)
    times = [0.1] * num_before + [0.1 * ratio] * num_after
    return [
        _run(day, second * rng.lognormvariate(0, 0.01)) for day, second in enumerate(times, start=1)
    ]


def test_without_changeforest_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "changeforest", None)
    with pytest.raises(RuntimeError, match=r"changeforest.*; install what this project needs"):
        find_change_points([0.1] * MIN_RECORDS)


def _only(runs: list[Run]) -> History:
    histories, left_out = find_histories(runs)
    assert not left_out
    assert len(histories) == 1
    return histories[0]


def test_a_slowdown_is_found_at_the_commit_that_brought_it() -> None:
    history = _only(_series(9, 9, ratio=1.06))
    change = history.changes[0]
    assert len(history.changes) == 1
    assert change.is_found
    assert history.points[change.index].commit == "c1000000"
    assert 1.05 < change.ratio < 1.07
    assert "c0900000..c1000000" in render(history)
    assert "2026-01-10" in render(history)


def test_equal_records_have_a_change_point_in_at_most_three_of_a_hundred_series() -> None:
    rng = random.Random(0)
    series = [[rng.lognormvariate(0, 0.1) for _ in range(20)] for _ in range(300)]
    assert sum(bool(find_change_points(seconds)) for seconds in series) <= 9


def test_one_slow_run_is_no_change_point() -> None:
    rng = random.Random(0)
    seconds = [rng.lognormvariate(0, 0.01) for _ in range(20)]
    seconds[7] *= 2
    assert find_change_points(seconds) == []


def test_times_that_are_all_equal_have_no_change_point() -> None:
    assert find_change_points([0.1] * MIN_RECORDS) == []


def test_a_change_point_needs_eight_records_and_the_text_says_so() -> None:
    history = _only(_series(4, 3, ratio=2))
    assert not history.can_change
    assert "fewer than 8 records" in render_short([history])
    assert "7 records" in render_short([history])
    assert _only(_series(4, 4, ratio=2)).changes[0].index == 4


def test_another_version_of_torch_is_a_change_with_its_name_and_no_change_point() -> None:
    before = [_run(day) for day in range(1, 10)]
    after = [_run(day, 0.2, versions=NEWER) for day in range(10, 19)]
    change = _only(before + after).changes[0]
    assert change.what == "torch 2.13.0 -> 2.14.1"
    assert not change.is_found
    assert change.ratio == 2


def test_versions_that_are_measured_in_turn_have_a_history_each() -> None:
    runs = [_run(day, versions=NEWER) if day % 2 else _run(day) for day in range(1, 7)]
    histories, _ = find_histories(runs)
    assert [len(history.points) for history in histories] == [3, 3]


def test_versions_with_too_few_records_are_named_by_the_packages_that_differ() -> None:
    versions = [{"torch": "2.13.0", "numpy": number} for number in ("2.3.0", "2.4.0")]
    runs = [_run(1 + i, versions=versions[i // 3] | {"python": "3.11.7"}) for i in range(6)]
    first, second = _only(runs).too_few
    assert first.startswith("torch 2.13.0, numpy 2.3.0: 3 records of the 8")
    assert second.startswith("torch 2.13.0, numpy 2.4.0: 3 records")


def test_records_of_other_machines_and_clocks_are_not_joined() -> None:
    clocks = [{**HOST, "sm_clock_hz": hz} for hz in (1.98e9, 1.97e9, 1.2e9)]
    machines = [HOST, {**HOST, "cpu": "Example 9001"}, *clocks]
    histories, _ = find_histories([_run(1 + i, hardware=[m]) for i, m in enumerate(machines)])
    assert sorted(len(history.points) for history in histories) == [1, 1, 1, 2]


def test_records_that_failed_or_have_no_time_are_left_out_with_the_reason() -> None:
    histories, left_out = find_histories([_run(1, started_at=None)])
    assert not histories
    assert left_out == ["runs/1.json: it does not say when it started"]


def test_runs_that_failed_or_whose_cell_did_are_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(_run(1).record, tmp_path / "a.json")
    write_record(make_crashed() | {"status": "oom"}, tmp_path / "b.json")
    write_hung_cell(_run(2).record, tmp_path / "s")
    assert main(["trend", "."]) == 0
    text = capsys.readouterr().out
    assert "): 1 record\n" in text
    assert "- b.json: status oom\n" in text
    assert "- s/cells/0123456789ab-1/x-1.json: its cell ended as timeout" in text


def test_the_processor_clock_decides_for_one_process_on_a_cpu_alone() -> None:
    assert _only([_run(1)]).clock == "processor time"
    gpu = {**HOST, "device": "NVIDIA H100"}
    assert _only([_run(1, hardware=[gpu])]).clock == "wall time"


def test_uncommitted_changes_are_marked_behind_the_commit() -> None:
    dirty = {"commit": "abcdef0123456789", "is_dirty": True}
    assert _only([_run(1, code=dirty)]).points[0].commit == "abcdef01+"


def test_the_plot_of_a_history_is_an_image() -> None:
    figure = draw_histories([_only(_series(9, 9, ratio=1.06))])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == 1
    assert texts[0].endswith("% since c1000000")
    assert figure_bytes(figure, "png").startswith(b"\x89PNG")
