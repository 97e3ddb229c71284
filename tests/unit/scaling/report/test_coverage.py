"""Which cells of a study have not ended, and how a report says so."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from scaling.report.coverage import Coverage, count_others, describe_groups, find_coverage
from scaling.store.reader import Store, load_store
from scaling.sweep.engine import open_folder
from scaling.sweep.study import Study, read_study
from tests.builders.reports import pages_of
from tests.builders.sweeps import LIMITS, make_study, make_tasks, work

SIZES = ["8", "16"]
AXES = {"precision": ["32-true", "bf16-true"], "batch-size": SIZES}


def swept(folder: Path, study: Study, *, without: int = 0) -> Store:
    """A sweep of a study from which the outcomes of the last cells are missing."""
    open_folder(folder / "night", study, LIMITS)
    tasks = make_tasks(study)
    work(folder / "night", tasks[: len(tasks) - without])
    return load_store([folder], relative_to=folder)


def coverage_of(store: Store) -> str:
    (coverage,) = find_coverage(store)[0].values()
    return coverage.describe()


def test_a_whole_sweep_has_no_line(tmp_path: Path) -> None:
    store = swept(tmp_path, make_study(axes=AXES))
    assert coverage_of(store) == ""
    assert "not complete" not in pages_of(store)["RESULTS.md"]
    assert "Not complete" not in pages_of(store)["night.md"]


def test_a_report_names_what_a_study_has_and_its_sweep_has_not(tmp_path: Path) -> None:
    store = swept(tmp_path, make_study(axes=AXES), without=1)
    missing = "3 of 4 cells ended; missing: 1 of GPT (precision 32-true, batch-size 16)"
    assert coverage_of(store) == missing
    pages = {name: " ".join(text.split()) for name, text in pages_of(store).items()}
    assert f"- night: {missing}." in pages["RESULTS.md"].replace("> ", "")
    assert f"Not complete: {missing}." in pages["night.md"]


def test_a_sweep_without_any_cell_is_named(tmp_path: Path) -> None:
    swept(tmp_path / "a", make_study(axes=AXES))
    open_folder(tmp_path / "empty", make_study(axes=AXES, repeats=2), LIMITS)
    store = load_store([tmp_path], relative_to=tmp_path)
    page = pages_of(store)["RESULTS.md"]
    assert (
        "- empty: 0 of 4 cells ended; missing: all 4 of GPT; 8 of 8 planned launches did not run."
        in page
    )
    assert "empty.md" not in pages_of(store)


def test_a_missing_launch_is_counted(tmp_path: Path) -> None:
    study = make_study(axes=AXES, repeats=2)
    assert coverage_of(swept(tmp_path, study, without=1)) == (
        "every cell has an outcome; 1 of 8 planned launches did not run"
    )


def test_failed_cells_are_counted_apart(tmp_path: Path) -> None:
    study = make_study(axes=AXES | {"batch-size": ["8", "4096"]})
    open_folder(tmp_path / "night", study, LIMITS)
    too_large = [task for task in make_tasks(study) if task.cell.options["batch-size"] == "4096"]
    work(tmp_path / "night", too_large[:1])
    assert coverage_of(load_store([tmp_path], relative_to=tmp_path)).startswith(
        "1 of 4 cells ended, 1 of them without success (oom); missing: 3 of GPT ("
    )


def test_more_launches_of_a_cell_hide_no_missing_cell(tmp_path: Path) -> None:
    study = make_study(axes=AXES, repeats=2)
    first = {cell.id for cell in study.cells()[:2]}
    open_folder(tmp_path / "night", study, LIMITS)
    work(tmp_path / "night", [task for task in make_tasks(study) if task.cell.id in first])
    cells = load_store([tmp_path], relative_to=tmp_path).cells
    assert len(cells) == 4
    coverage = Coverage(study=replace(study, repeats=1), cells=cells)
    missing = "2 of 4 cells ended; missing: 2 of GPT (precision bf16-true)"
    assert coverage.describe() == missing


def test_a_study_whose_axis_was_narrowed_is_read(tmp_path: Path) -> None:
    excluded = [{"batch-size": ["32"]}]  # of the study's file, before the command line
    values = make_study(axes=AXES).as_dict() | {"exclude": excluded}
    with pytest.raises(ValueError, match="batch-size holds 32"):
        read_study(values)
    study = read_study(values, is_narrowed=True)
    assert coverage_of(swept(tmp_path, study, without=1)).startswith("3 of 4 cells")


def test_a_search_of_batch_sizes_has_no_cells_to_miss(tmp_path: Path) -> None:
    open_folder(tmp_path / "night", make_study(axes=AXES), LIMITS, find_max_batch=64)
    assert load_store([tmp_path], relative_to=tmp_path).studies == {}


def test_an_edited_or_unknown_study_is_reported(tmp_path: Path) -> None:
    swept(tmp_path, make_study(axes=AXES))
    path = tmp_path / "night" / "study.json"
    values = json.loads(path.read_text())
    values["study"]["recipe"] = ["gpt2"]
    path.write_text(json.dumps(values))
    (file,) = load_store([tmp_path], relative_to=tmp_path).left_out
    assert (file.kind, file.name) == ("damaged", "night/study.json")
    assert "study was changed after it was written" in file.reason
    shutil.rmtree(tmp_path / "night" / "cells")
    (tmp_path / "night" / "study.json").unlink()
    store = Store(runs=(), left_out=(), studies={"night": values["study"]})
    (reason,) = find_coverage(store)[1].values()
    assert reason.startswith("its study cannot be read: recipe gpt2 is not known")


def test_missing_cells_are_grouped_by_the_values_they_share() -> None:
    axes = {"strategy": ["ddp", "fsdp", "zero2"], "devices": ["1", "2"], "batch-size": SIZES}
    planned = make_study(axes=axes).cells()
    missing = [c for c in planned if c.options["batch-size"] == "16" or c.options["devices"] == "2"]
    assert describe_groups(missing, planned) == "devices 2; batch-size 16"
    missing = [
        c for c in planned if c.options["devices"] == "2" and c.options["strategy"] != "fsdp"
    ]
    assert describe_groups(missing, planned) == "strategy ddp or zero2, devices 2"


def test_groups_hold_every_missing_cell_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaling.report.coverage.MOST_GROUPS", 1000)
    axes = {name: ["1", "2", "3"] for name in ("devices", "batch-size", "accumulate", "seed")}
    planned = make_study(axes=axes).cells()
    drawn = random.Random(1)
    for share in (0.03, 0.3, 0.6, 0.97):
        missing = [cell for cell in planned if drawn.random() < share]
        held = set()
        for group in describe_groups(missing, planned).split("; "):
            values = {
                name: values.split(" or ")
                for name, values in (part.split(" ", 1) for part in group.split(", "))
            }
            held |= {
                c.id for c in planned if all(c.options[n] in chosen for n, chosen in values.items())
            }
        assert held == {cell.id for cell in missing}


def test_many_groups_end_in_a_number() -> None:
    axes = {name: list("123456") for name in ("devices", "batch-size", "seed")}
    planned = make_study(axes=axes).cells()
    text = describe_groups(random.Random(1).sample(planned, 50), planned)
    assert text.count(";") == 4
    assert re.search(r"; and \d+ more$", text)


def test_other_configurations_of_the_same_work_are_counted(tmp_path: Path) -> None:
    axes = AXES | {"dropout": ["0", "0.1"]}
    store = swept(tmp_path, make_study(axes=axes), without=2)
    (coverage,) = find_coverage(store)[0].values()
    left_out = {cell.options["dropout"] for cell in coverage.missing}
    for dropout in ("0", "0.1"):
        runs = [
            cell.run.name
            for cell in store.cells
            if cell.run is not None and cell.outcome.options["dropout"] == dropout
        ]
        others, missing = count_others([coverage], runs[:1])
        assert others == 3
        assert missing == sum(cell.options["dropout"] == dropout for cell in coverage.missing)
    assert left_out
    assert count_others([coverage], []) == (0, 0)


@pytest.mark.parametrize("more", [{}, {"max-steps": "60", "log-every": "3", "seed": "1"}])
def test_what_ended_in_one_sweep_is_missing_in_no_other(
    tmp_path: Path, more: dict[str, str]
) -> None:
    swept(tmp_path / "whole", make_study(axes=AXES))
    swept(tmp_path / "begun", make_study(axes=AXES, options=more), without=3)
    store = load_store([tmp_path], relative_to=tmp_path)
    coverages = find_coverage(store)[0].values()
    assert sum(len(coverage.missing) for coverage in coverages) == 3
    names = [cell.run.name for cell in store.cells if cell.run is not None]
    assert count_others(coverages, names) == (0, 0)
    assert count_others(coverages, names[:1]) == (3, 0)


def test_a_configuration_that_a_study_runs_at_two_lengths_counts_once(tmp_path: Path) -> None:
    store = swept(tmp_path, make_study(axes=AXES | {"max-steps": ["20", "60"]}))
    names = [cell.run.name for cell in store.cells if cell.run is not None]
    assert count_others(find_coverage(store)[0].values(), names[:1]) == (3, 0)
