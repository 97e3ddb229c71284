"""Metrics are cached by the exact bytes of a record and the version of the code."""

import os
import time
from pathlib import Path

import pytest

from scaling.store import metrics_cache
from scaling.store.metrics_cache import Kept, open_kept
from scaling.store.reader import Store, load_store
from scaling.store.run import Run, find_contradictions, find_recounts
from tests.builders.records import make_record
from unitransformer.record.schema import write_record


def load(folder: Path, kept: Kept | None = None) -> Store:
    return load_store([folder], relative_to=folder, kept=kept)


def figures(run: Run) -> tuple[object, ...]:
    readout = run.readout
    return (
        readout,
        readout and (readout.as_dict(), readout.cpu),
        readout and run.launch,
        run.steady_today,
        find_contradictions(run),
        find_recounts(run),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records with and without an interval, without a steady state, one that contradicts itself,
    and a failed one."""
    records = {
        "long": make_record(step_s=[0.5] + [0.1 + 0.001 * (n % 7) for n in range(99)]),
        "short": make_record(),
        "shortest": make_record(step_s=[0.1, 0.2, 0.3]),
        "odd": make_record(num_parameters=7, tokens_per_s=1.0),
        "failed": make_record(status="crashed"),
    }
    for name, record in records.items():
        write_record(record, tmp_path / "records" / f"{name}.json")
    return tmp_path / "records"


def test_cached_metrics_equal_computed_metrics(folder: Path, tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept")
    fresh, first, second = load(folder), load(folder, kept), load(folder, kept)
    assert fresh == first == second
    assert [run.name for run in second.runs if run.found] == [
        *("long.json", "odd.json", "short.json", "shortest.json")
    ]
    for one, other, last in zip(fresh.runs, first.runs, second.runs, strict=True):
        if one.is_ok:
            assert figures(one) == figures(other) == figures(last)


def test_metrics_are_computed_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(tmp_path / "kept")
    load(folder, kept)
    monkeypatch.setattr("scaling.store.reader.find", lambda run: pytest.fail(f"{run.name} again"))
    load(folder, kept)


def test_a_changed_digit_invalidates_cached_metrics(folder: Path, tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept")
    load(folder, kept)
    text = (folder / "long.json").read_text()
    (folder / "long.json").write_text(text.replace("0.104", "0.204", 1))
    (left_out,) = load(folder, kept).left_out
    assert left_out.kind == "damaged"
    assert "was changed after it was written" in left_out.reason


@pytest.mark.parametrize("damage", [lambda text: text[:200], lambda text: text.replace("1", "2")])
def test_a_damaged_cache_file_is_ignored(folder: Path, tmp_path: Path, damage: object) -> None:
    kept = Kept(tmp_path / "kept")
    before = [figures(run) for run in load(folder, kept).runs if run.is_ok]
    for path in (tmp_path / "kept").rglob("*.json"):
        path.write_text(damage(path.read_text()))  # type: ignore[operator]
    assert [figures(run) for run in load(folder, kept).runs if run.is_ok] == before


def test_an_unwritable_cache_costs_only_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert load(folder, Kept(tmp_path / "file" / "kept")) == load(folder)


def test_other_code_recomputes_metrics_and_unused_entries_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path))
    own = open_kept().folder
    (own / "00").mkdir()
    monkeypatch.setattr(metrics_cache, "_code_digest", lambda: "other")
    other = open_kept().folder
    assert own != other
    assert (own / "00").is_dir()  # used a moment ago
    long_ago = time.time() - 2 * metrics_cache.UNUSED_S
    os.utime(own, (long_ago, long_ago))
    open_kept()
    assert not own.exists()
    assert other.is_dir()
