import pytest

from scaling.prediction.fit_file import PATH as FIT_FILE
from scaling.prediction.validation import table


def test_predictions_beat_the_null_predictors_and_meet_their_targets() -> None:
    rows = {row.name: row for row in table()}
    speed = rows["unseen model, FSDP, llm-foundry: mean error"]
    count = rows["unseen device count, the largest of three or more: mean error"]

    for row in (speed, count, rows["unseen model, DDP: mean error"]):
        assert row.null is not None
        assert row.is_met
        assert row.figure < row.null
    assert speed.num_rows == 145
    assert 0.85 <= rows["90 % intervals: share of rows inside"].figure <= 0.95


def test_a_file_without_published_runs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fit\.json"):
        table(FIT_FILE)
