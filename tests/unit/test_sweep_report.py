"""Cells of a sweep in the report: every one a row, plots where there is something to plot."""

import re
from dataclasses import replace
from pathlib import Path

from test_store import make_record
from test_sweep import Straw, make_study, make_tasks, work

from scaling.conditions import apart
from scaling.efficiency import pool
from scaling.joining import conditions_of, processors_of, without_threads
from scaling.report import draw_plots, render_report
from scaling.store import Store, load_store
from scaling.sweep_plots import plots_of
from unitransformer.config import ParallelConfig
from unitransformer.records import write_record


def swept(folder: Path) -> Store:
    """Ten cells, half of them out of memory, and a run beside them."""
    work(folder / "night", make_tasks(make_study()))
    write_record(make_record("gpt"), folder / "single" / "a-1.json")
    return load_store([folder], relative_to=folder)


def render(store: Store) -> str:
    return render_report(store, command="python -m scaling report .", plots="plots")


def test_every_cell_is_a_row_with_its_status_and_command(tmp_path: Path) -> None:
    store = swept(tmp_path)
    text = render(store)
    (section,) = re.findall(r"### Sweep night\n(.*?)(?=\n##|\Z)", text, flags=re.DOTALL)
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| ")][1:]
    assert [tuple(map(str.strip, row)) for row in rows] == [
        ("32-true", "8", "ok"),
        ("32-true", "16", "ok"),
        ("32-true", "32", "oom"),
        ("32-true", "64", "oom-inferred"),
        ("32-true", "128", "oom-inferred"),
        ("bf16-true", "8", "ok"),
        ("bf16-true", "16", "ok"),
        ("bf16-true", "32", "ok"),
        ("bf16-true", "64", "oom"),
        ("bf16-true", "128", "oom-inferred"),
    ]
    assert "10 cells: 5 ok, 2 oom, 3 oom-inferred." in section
    assert section.count("python -m recipes.gpt --precision") == 10
    assert section.count("needs at least as much memory as") == 3


def test_runs_of_a_sweep_are_not_told_a_second_time(tmp_path: Path) -> None:
    store = swept(tmp_path)
    assert [run.name for run in store.single_runs] == ["single/a-1.json"]
    text = render(store)
    assert "### All runs" not in text
    assert "single/a-1.json" in text.split("## GPT")[1].split("### Architecture")[0]


def test_a_recipe_that_was_only_swept_has_its_section_too(tmp_path: Path) -> None:
    work(tmp_path / "night", make_tasks(make_study()))
    text = render(load_store([tmp_path], relative_to=tmp_path))
    assert "### Parameters" in text
    assert "### Sweep night" in text


def test_a_recipe_of_which_no_cell_ended_well_is_told(tmp_path: Path) -> None:
    work(tmp_path / "night", make_tasks(make_study()), straw=Straw({}, capacity=1))
    text = render(load_store([tmp_path], relative_to=tmp_path))
    assert "## GPT" in text
    assert "10 cells: 1 oom, 9 oom-inferred." in text


def test_two_sweeps_of_one_name_have_plots_of_their_own(tmp_path: Path) -> None:
    for place, sizes in (("x", ["8", "16"]), ("y", ["9", "17"])):
        (tmp_path / place).mkdir()
        axes = {"precision": "32-true", "batch-size": sizes}
        work(tmp_path / place / "night", make_tasks(make_study(axes=axes)))
    store = load_store([tmp_path], relative_to=tmp_path)
    drawn = draw_plots(store)
    assert {"gpt-night-1-speed-by-batch.svg", "gpt-night-2-speed-by-batch.svg"} <= set(drawn)
    text = render(store)
    assert "### Sweep night 1" in text
    assert "### Sweep night 2" in text


def test_plots_are_drawn_along_axes_with_two_values_and_named_in_the_text(tmp_path: Path) -> None:
    store = swept(tmp_path)
    drawn = draw_plots(store)
    assert set(drawn) == {
        "gpt-loss.svg",
        "gpt-night-speed-by-batch.svg",
        "gpt-night-memory-by-batch.svg",
    }
    assert drawn == draw_plots(store)
    text = render(store)
    assert set(re.findall(r"\(plots/([^)]+)\)", text)) == set(drawn)
    assert text == render(store)


def test_efficiency_is_plotted_where_devices_differ(tmp_path: Path) -> None:
    tasks = []
    for task in make_tasks(make_study(axes={"precision": "32-true", "devices": ["1", "2"]})):
        devices = int(task.cell.options["devices"])
        parallel = ParallelConfig(accelerator="cpu", strategy="ddp", devices=devices)
        assert task.config is not None
        tasks.append(replace(task, config=replace(task.config, parallel=parallel)))
    work(tmp_path / "s", tasks)
    cells = load_store([tmp_path], relative_to=tmp_path).cells
    plots = {plot.name: plot for plot in plots_of("gpt-s", cells)}
    assert set(plots) == {
        *("gpt-s-speed-by-devices", "gpt-s-memory-by-devices", "gpt-s-efficiency-by-devices"),
    }
    ((line, marks),) = plots["gpt-s-efficiency-by-devices"].panels.popitem()[1].items()
    assert line == "ddp, batch 8 a device"
    # Equal steps of twice the batch on twice the devices: no time is lost.
    assert [(x, round(told.value, 6)) for x, told in marks] == [(1, 1.0), (2, 1.0)]


def test_a_record_that_is_gone_or_damaged_leaves_its_row(tmp_path: Path) -> None:
    store = swept(tmp_path)
    lost = next(cell for cell in store.cells if cell.outcome.status == "ok")
    (record,) = [
        p for p in (tmp_path / lost.name).parent.glob("*.json") if p.name != "outcome.json"
    ]
    record.unlink()
    text = render(load_store([tmp_path], relative_to=tmp_path))
    assert text.count("its record is missing or damaged") == 1


def test_a_record_of_a_cell_that_is_under_way_is_no_run_of_its_own(tmp_path: Path) -> None:
    store = swept(tmp_path)
    ended = next(cell for cell in store.cells if cell.run is not None and cell.run.is_ok)
    (tmp_path / ended.name).unlink()
    again = load_store([tmp_path], relative_to=tmp_path)
    assert [run.name for run in again.single_runs] == [run.name for run in store.single_runs]
    (left,) = [file for file in again.left_out if "under way" in file.reason]
    assert ended.run is not None
    assert left.name == ended.run.name
    assert re.search(r"more files?: not a finished run", render(again))


def test_cells_of_two_kinds_of_machine_are_two_lines_and_said_to_differ(tmp_path: Path) -> None:
    store = swept(tmp_path)
    first, *_ = [cell.run for cell in store.cells if cell.run is not None and cell.run.is_ok]
    assert first is not None
    moved = first.record | {
        "hardware": [{**host, "cpu": "Another 1"} for host in first.record["hardware"]]
    }
    assert processors_of(moved) != processors_of(first.record)
    assert conditions_of(moved) != conditions_of(first.record)
    assert processors_of(without_threads(first.record)) == processors_of(first.record)
    other = replace(first, record=moved)
    assert len(pool([first, other])) == 2
    assert "processors and devices differ" in apart([first.record, moved])
