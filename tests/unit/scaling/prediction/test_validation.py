import shutil
from pathlib import Path

import pytest

from scaling.lint.contradictions import find_contradictions
from scaling.prediction import validation
from scaling.prediction.fit_file import PATH as FIT_FILE
from scaling.prediction.validation import SMALL_WIDTH, STORED_SWEEPS, stored_runs, table
from scaling.store.outcome import FILE
from tests.builders.sweeps import write_hung_cell
from unitransformer.record.schema import load_record


def test_predictions_beat_the_null_predictors_and_meet_their_targets() -> None:
    rows = {row.name: row for row in table()}
    speed = rows["unseen model, FSDP, llm-foundry: mean error"]
    count = rows["unseen device count, the largest of three or more: mean error"]

    for row in (speed, count, rows["unseen model, DDP: mean error"]):
        assert row.null is not None
        assert row.is_met
        assert row.figure < row.null
    assert speed.num_rows == 145
    memory = "published peak memory, an estimator of its own, forms chosen with these rows in view"
    assert rows[f"{memory}: mean error"].num_rows == 36
    assert 0.85 <= rows["90 % intervals: share of rows inside"].figure <= 0.95


def test_an_installed_package_says_which_records_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, absent = STORED_SWEEPS[0], tmp_path / "prediction/small_cells"
    monkeypatch.setattr(validation, "STORED_SWEEPS", (here, absent))
    message = f"measured runs in {absent}, which an installed package does not hold: run it in a"
    with pytest.raises(ValueError, match=message):
        table()


def test_a_file_without_published_runs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fit\.json"):
        table(FIT_FILE)


def test_the_stored_runs_are_whole_and_follow_from_their_samples() -> None:
    runs = stored_runs()
    small = [run for run in runs if run.config.model.width < SMALL_WIDTH]
    assert len(small) == 167
    assert len({run.config.hash() for run in runs if run not in small}) >= 56
    assert [what for run in runs for what in find_contradictions(run)] == []


def test_a_run_whose_cell_did_not_end_well_is_not_judged(tmp_path: Path) -> None:
    run = next(path for path in (STORED_SWEEPS[1] / "cells").rglob("*.json") if path.name != FILE)
    write_hung_cell(load_record(run), tmp_path)
    assert stored_runs([tmp_path]) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("edited", "is damaged: "),
        ("removed", r"outcome\.json lacks its record; restore it"),
        ("no folder", "small"),
    ],
)
def test_a_damaged_or_missing_record_is_an_error(damage: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    for cell in sorted((STORED_SWEEPS[1] / "cells").iterdir())[:2]:
        shutil.copytree(cell, folder / "cells" / cell.name)
    assert len(stored_runs([folder])) == 2
    record = next(path for path in folder.rglob("*.json") if path.name != "outcome.json")
    if damage == "edited":
        record.write_text(record.read_text().replace("0.1", "0.2", 1))
    elif damage == "removed":
        record.unlink()
    else:
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=message):
        stored_runs([folder])
