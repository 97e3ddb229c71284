"""Predictions beside measurements: the error so far on the first page, every row on another one."""

from dataclasses import replace
from pathlib import PurePosixPath

import pytest

from scaling.prediction.held_out import predict_held_out
from scaling.prediction.measured_rows import FEWEST
from scaling.report.results_md import render_pages
from scaling.report.rows import rows, with_predictions
from scaling.report.staleness import CurrentCode
from scaling.report.store_analysis import StoreAnalysis
from scaling.store.reader import Store
from tests.builders.records import make_record
from tests.builders.reports import OPTIONS, make_store, pages_of
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


def test_a_stale_configuration_is_marked_and_not_counted() -> None:
    runs = [
        make_spread(0.01 * batch, f"{batch:02}.json", steps=10, batch_size=batch)
        for batch in range(1, FEWEST + 1)
    ]
    old = "ab" * 6
    longest = make_spread(0.5, "old.json", steps=20, batch_size=50)
    code = longest.record["code"] | {"commit": old}
    runs.append(replace(longest, record=longest.record | {"code": code}))
    store = Store(runs=tuple(runs), left_out=())
    today = CurrentCode(torch=None, is_checkout=True, changed=frozenset([old]))
    pages = render_pages(StoreAnalysis(store, today), OPTIONS)
    first, page = pages[PurePosixPath("RESULTS.md")], pages[PurePosixPath("pages/predictions.md")]
    for text in (first, page):
        assert f"of {FEWEST} speeds" in " ".join(text.split())
        assert "after the record are stale: no fit uses them" in " ".join(text.split())
    assert f"[record](../{runs[-1].name})†" in page
    part = first.partition("## Predicted and measured")[2].partition("\n## ")[0]
    assert f"({runs[-1].name})†" in part, "the longest run"


def test_the_first_page_has_the_error_of_each_recipe() -> None:
    runs = [
        make_spread(0.01 * batch, f"{batch:02}.json", steps=10, batch_size=batch)
        for batch in range(1, 2 * FEWEST + 1)
    ]
    model = replace(runs[0].config.model, causal=False)
    for place in range(FEWEST, 2 * FEWEST):
        config = replace(runs[place].config, recipe="bert", model=model)
        runs[place] = replace(runs[place], config=config)
    text = " ".join(pages_of(Store(runs=tuple(runs), left_out=()))["RESULTS.md"].split())
    for title in ("BERT", "GPT"):
        assert f"- {title}: median " in text
    assert text.count(f"of {FEWEST} speeds") == 2


def test_without_a_calibration_the_first_page_says_so_in_one_line() -> None:
    pages = pages_of(make_store(make_record()))
    assert "predictions.md" not in pages
    line = "Example 9000: no prediction, as a fit that leaves some out needs 10 configurations"
    assert line in " ".join(pages["RESULTS.md"].split())


def test_exported_rows_have_the_predictions_of_the_report() -> None:
    runs = [
        make_spread(0.01 * batch, f"{batch:02}.json", steps=10, batch_size=batch)
        for batch in range(1, FEWEST + 1)
    ]
    found, _ = predict_held_out(runs)
    unpredicted = make_store(make_record())
    assert with_predictions(rows(unpredicted), found) == rows(unpredicted)
    store = Store(runs=tuple(runs), left_out=())
    exported = {row.record: row for row in with_predictions(rows(store), found)}
    assert len(exported) == len(found) == FEWEST
    for item in found:
        row = exported[item.run.name]
        units = item.config.batch_size * 8  # tokens of a sample
        assert row.predicted_units_per_s == pytest.approx(units / item.step_s.value)
        assert row.low_predicted_units_per_s == pytest.approx(units / item.step_s.high)
        assert row.high_predicted_units_per_s == pytest.approx(units / item.step_s.low)
        assert row.prediction_provenance == item.provenance
        assert item.memory_bytes is not None
        assert row.predicted_peak_bytes == round(item.memory_bytes.value)
        assert row.high_predicted_peak_bytes == round(item.memory_bytes.high)


def test_a_configuration_far_beyond_the_others_is_extrapolated() -> None:
    batches = [*range(1, FEWEST + 1), 100]  # 100 is more than four times 10
    runs = [
        make_spread(0.01 * batch, f"{batch:03}.json", steps=10, batch_size=batch)
        for batch in batches
    ]
    found, _ = predict_held_out(runs)
    assert {item.config.batch_size for item in found if item.provenance == "extrapolated"} == {100}
