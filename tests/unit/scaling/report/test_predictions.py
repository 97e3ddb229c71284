"""Predictions beside measurements: the error so far on the first page, every row on another one."""

from scaling.prediction.held_out import FEWEST
from scaling.store.reader import Store
from tests.builders.records import make_record
from tests.builders.reports import make_store, pages_of
from tests.builders.runs import make_spread


def test_every_measured_configuration_has_its_prediction_and_the_first_page_the_error() -> None:
    runs = [
        make_spread(0.01 * batch, f"{batch:02}.json", steps=10, batch_size=batch)
        for batch in range(1, FEWEST + 1)
    ]
    pages = pages_of(Store(runs=tuple(runs), left_out=()))
    first, rows = pages["RESULTS.md"], pages["predictions.md"]
    assert "**Error so far: median " in first
    assert f"of {FEWEST} speeds" in " ".join(first.split())
    assert "[predictions.md](pages/predictions.md)" in first
    for run in runs:
        assert rows.count(f"[record](../{run.name})") == 1
    row = next(line for line in rows.splitlines() if "02.json" in line)
    assert "| 800 tokens/s |" in row  # 2 samples of 8 tokens in 0.02 s


def test_without_a_calibration_the_first_page_says_so_in_one_line() -> None:
    pages = pages_of(make_store(make_record()))
    assert "predictions.md" not in pages
    line = "Example 9000: no prediction, as a fit that leaves some out needs 10 configurations"
    assert line in " ".join(pages["RESULTS.md"].split())
