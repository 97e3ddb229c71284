"""Tests sweep cells in the report: a row for each, and plots along axes with several values."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from scaling.analysis.efficiency import pool
from scaling.analysis.fastest import find_tried
from scaling.lint.contradictions import check_rows
from scaling.report.plots import COLORS, Plot
from scaling.report.results_md import draw_plots
from scaling.report.rows import rows
from scaling.report.sections.sweep import not_drawn, sweep_blocks
from scaling.report.store_analysis import StoreAnalysis
from scaling.report.table_notes import conditions_of_rows
from scaling.store.conditions import conditions_of, processors_of, without_threads
from scaling.store.outcome import CellOutcome
from scaling.store.reader import Cell, Store, load_store
from scaling.store.run import Run
from tests.builders.records import HOST, make_record
from tests.builders.reports import pages_of, sweep_of, text_of
from tests.builders.runs import make_spread, strong
from tests.builders.sweeps import FakeMachine, make_study, make_tasks, work
from unitransformer.config import DataConfig, ParallelConfig, Strategy
from unitransformer.record.schema import write_record


def swept(folder: Path) -> Store:
    """Ten cells, half of them out of memory, and a run outside of the sweep."""
    work(folder / "night", make_tasks(make_study()))
    write_record(make_record("gpt"), folder / "single" / "a-1.json")
    return load_store([folder], relative_to=folder)


def test_every_cell_is_a_row_with_its_status_and_command(tmp_path: Path) -> None:
    section = pages_of(swept(tmp_path))["night.md"]
    table = section.split("**Largest batch")[0].splitlines()
    rows = [line.split("|")[2:5] for line in table if line.startswith("| ")][2:]
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
    assert "10 configurations, 10 launches: 5 ok, 2 oom, 3 oom-inferred." in section
    assert section.count("python -m recipes.gpt --precision") == 10
    assert section.count("needs at least as much memory as") == 6, "of a configuration, of a launch"


def blocks_of(cells: Sequence[Cell]) -> list[str]:
    return sweep_blocks(sweep_of(cells), [], [])


def table_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of the configurations of a sweep."""
    block, _ = [b for b in blocks_of(cells) if b.startswith("|")]
    heads, _, *rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()
    ]
    return heads, rows


def test_the_table_omits_empty_columns_and_captions_shared_settings() -> None:
    cells = [
        replace(
            cell, outcome=replace(cell.outcome, options={**cell.outcome.options, "dropout": "0"})
        )
        for cell in cells_of([strong(0.1, n) for n in (1, 2)])
    ]
    heads, _ = table_of(cells)
    assert not {"MFU", "remarks", "dropout"} & set(heads)
    assert {"#", "speed", "devices"} <= set(heads)
    blocks = blocks_of(cells)
    about = "a model of 6.1 K parameters (2 layers of width 16), dropout 0"
    assert f"All cells: {about}." in blocks
    assert "No MFU: a CPU has no published peak; compare with its measured ceiling." in blocks


def test_the_table_shows_the_efficiency_of_each_row() -> None:
    heads, rows = table_of(cells_of([strong(0.1, 1), strong(0.0625, 2)]))
    assert [row[heads.index("strong efficiency")] for row in rows] == [
        "baseline",
        "80.0% (80.0% to 80.0%)",
    ]
    assert "weak efficiency" not in heads
    split = [strong(0.1, n, changes={"hardware": [HOST | {"threads": 2 // n}] * n}) for n in (1, 2)]
    heads, rows = table_of(cells_of(split))
    assert rows[1][heads.index("strong efficiency")].startswith("50.0%")
    assert any(
        "an efficiency of 1/n loses nothing" in block for block in blocks_of(cells_of(split))
    )


def test_the_largest_batch_below_out_of_memory_has_a_row(tmp_path: Path) -> None:
    cells = swept(tmp_path).cells
    blocks = blocks_of(cells)
    (table,) = [block for block in blocks if re.match(r"\|.* does not fit", block)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    actual = [(precision, fits.split(",")[0], not_) for precision, fits, not_ in rows]
    assert actual == [("32-true", "16", "32, oom"), ("bf16-true", "32", "64, oom")]
    assert not any("does not fit" in b for b in blocks_of(cells_of([strong(0.1, 1)])))


def test_runs_of_a_sweep_are_not_listed_twice(tmp_path: Path) -> None:
    store = swept(tmp_path)
    assert [run.name for run in store.single_runs] == ["single/a-1.json"]
    text = text_of(store)
    assert "### All runs" not in text
    assert "single/a-1.json" in text.split("# Single runs")[1].split("### Architecture")[0]


def test_a_recipe_with_only_sweep_runs_has_a_section(tmp_path: Path) -> None:
    work(tmp_path / "night", make_tasks(make_study()))
    text = text_of(load_store([tmp_path], relative_to=tmp_path))
    assert "<summary>Parameters</summary>" in text
    assert "# Sweep night" in text


def test_a_recipe_without_a_successful_cell_is_reported(tmp_path: Path) -> None:
    work(tmp_path / "night", make_tasks(make_study()), machine=FakeMachine({}, capacity=1))
    text = text_of(load_store([tmp_path], relative_to=tmp_path))
    assert "## GPT" in text
    assert "10 configurations, 10 launches: 1 oom, 9 oom-inferred." in text


def test_two_sweeps_of_one_name_have_separate_plots(tmp_path: Path) -> None:
    for place, sizes in (("x", ["8", "16"]), ("y", ["9", "17"])):
        (tmp_path / place).mkdir()
        axes = {"precision": "32-true", "batch-size": sizes}
        work(tmp_path / place / "night", make_tasks(make_study(axes=axes)))
    store = load_store([tmp_path], relative_to=tmp_path)
    drawn = draw_plots(StoreAnalysis(store))
    assert {"gpt-night-1-speed-by-batch.svg", "gpt-night-2-speed-by-batch.svg"} <= set(drawn)
    text = text_of(store)
    assert "# Sweep night 1" in text
    assert "# Sweep night 2" in text
    assert {"night-1.md", "night-2.md"} <= set(pages_of(store))


def test_plots_are_drawn_along_axes_with_two_values_and_named_in_the_text(tmp_path: Path) -> None:
    store = swept(tmp_path)
    drawn = draw_plots(StoreAnalysis(store))
    assert set(drawn) == {
        "gpt-loss.svg",
        "gpt-night-speed-by-batch.svg",
        "gpt-night-memory-by-batch.svg",
    }
    assert drawn == draw_plots(StoreAnalysis(store))
    text = text_of(store)
    assert set(re.findall(r"\((?:\.\./)?plots/([^)]+)\)", text)) == set(drawn)
    assert text == text_of(store)


def test_efficiency_is_plotted_if_device_counts_differ(tmp_path: Path) -> None:
    tasks = []
    for task in make_tasks(make_study(axes={"precision": "32-true", "devices": ["1", "2"]})):
        devices = int(task.cell.options["devices"])
        parallel = ParallelConfig(accelerator="cpu", strategy="ddp", devices=devices)
        assert task.config is not None
        tasks.append(replace(task, config=replace(task.config, parallel=parallel)))
    work(tmp_path / "s", tasks)
    cells = load_store([tmp_path], relative_to=tmp_path).cells
    plots = {plot.name: plot for plot in sweep_of(cells).plots}
    assert set(plots) == {
        *("gpt-s-speed-by-devices", "gpt-s-memory-by-devices", "gpt-s-efficiency-by-devices"),
    }
    efficiency = plots["gpt-s-efficiency-by-devices"].panels
    assert list(efficiency) == ["weak scaling, 32-true"]
    line, ideal = efficiency["weak scaling, 32-true"]
    assert (line.label, ideal.label) == ("ddp, 8", "ideal")
    # Equal steps of twice the batch on twice the devices: no time is lost.
    assert [(mark.x, round(mark.value, 6)) for mark in line.marks] == [(1, 1.0), (2, 1.0)]


def cells_of(runs: Sequence[Run]) -> list[Cell]:
    """One sweep cell per run."""
    return [
        Cell(
            name=f"s/cells/{number:012x}-1/outcome.json",
            outcome=CellOutcome(
                cell=f"{number:012x}",
                repeat=1,
                recipe="gpt",
                options={"devices": str(run.config.parallel.devices)},
                command="",
                status="ok",
                config=run.config,
            ),
            run=run,
        )
        for number, run in enumerate(runs)
    ]


def lines(plot: Plot) -> dict[tuple[str, str], list[float]]:
    """Places of the marks, by panel and label."""
    return {
        (panel, line.label): [mark.x for mark in line.marks]
        for panel, panel_lines in plot.panels.items()
        for line in panel_lines
        if line.label != "ideal"
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": DataConfig(sequence_length=4)}, "sequence length 4"),
        ({"accumulate": 2}, "accumulate 2"),
        ({"loss_chunk": 8}, "loss chunk 8"),
        ({"seed": 1}, "seed 1"),
    ],
)
def test_runs_that_differ_in_another_setting_are_two_lines(
    change: dict[str, object], expected: str
) -> None:
    plain = [make_spread(0.1, f"{size}.json", batch_size=size) for size in (2, 4)]
    other = [
        replace(run, config=replace(run.config, **change), name=f"other-{run.name}")
        for run in plain
    ]
    (speed, _) = sweep_of(cells_of([*plain, *other])).plots
    assert list(lines(speed).values()) == [[2, 4], [2, 4]]
    assert any(label.endswith(expected) for _, label in lines(speed))
    assert len({line.style for line in speed.panels["32-true"]}) == 2


def test_other_machines_and_cpu_offload_are_separate_lines() -> None:
    spread = {"strategy": "fsdp", "accelerator": "cuda"}
    runs = [
        make_spread(0.1, f"{n}-{off}.json", devices=n, cpu_offload=off, **spread)
        for n in (1, 2)
        for off in (False, True)
    ]
    by_devices = [plot for plot in sweep_of(cells_of(runs)).plots if "speed" in plot.name]
    assert list(by_devices[0].panels) == [
        "weak scaling, 32-true, offloaded to the host no",
        "weak scaling, 32-true, offloaded to the host yes",
    ]
    moved = [strong(0.1, n, f"b-{n}.json", changes={"hardware": [HOST | {"cpu": "B"}] * n})
             for n in (1, 2)]  # fmt: skip
    here = [strong(0.1, n, f"a-{n}.json") for n in (1, 2)]
    (plot,) = [p for p in sweep_of(cells_of([*here, *moved])).plots if "speed" in p.name]
    assert sorted(lines(plot)) == [
        ("strong scaling, 32-true", "ddp, 8, machine 1"),
        ("strong scaling, 32-true", "ddp, 8, machine 2"),
    ]


def launches(number: int, devices: int, *, batch_size: int = 2) -> list[Run]:
    """Launches of one config that differ by up to 10 %."""
    return [
        make_spread(
            0.1 * (1 + 0.1 * index / number),
            f"{devices}-{batch_size}-{index}.json",
            noise=0.01,
            devices=devices,
            batch_size=batch_size,
            strategy="ddp",
        )
        for index in range(number)
    ]


def test_an_interval_of_two_launches_isnot_drawn_but_the_launches_are() -> None:
    two = pool(launches(2, 1))[0]
    assert two.rate.high is not None
    assert two.rate.high > 1.3 * max(run.units_per_s or 0.0 for run in two.runs)
    plots = sweep_of(cells_of([*launches(2, 1), *launches(2, 2)])).plots
    marks = [m for plot in plots for panel in plot.panels.values() for m in panel[0].marks]
    assert {(mark.low, mark.high, len(mark.samples)) for mark in marks} == {(None, None, 2)}
    highest = max(mark.x * 8 * 2 / 0.1 for mark in marks)
    assert all(value <= highest for mark in marks for value in mark.samples)


def test_an_interval_of_five_launches_is_drawn() -> None:
    speed, _, efficiency = sweep_of(cells_of([*launches(5, 1), *launches(5, 2)])).plots
    for mark in speed.panels["weak scaling, 32-true"][0].marks:
        assert mark.low is not None
        assert mark.high is not None
        assert mark.low < mark.value < mark.high
    assert efficiency.panels["weak scaling, 32-true"][0].marks[1].low is not None
    assert "Bars: 95\u00a0% intervals." in speed.caption


def test_an_interval_pooled_over_configurations_is_drawn_and_one_launch_has_no_dots() -> None:
    # Five launches of one configuration have four degrees of freedom, which one launch may use.
    speed, _, efficiency = sweep_of(cells_of([*launches(5, 1), *launches(1, 2)])).plots
    (five, one) = speed.panels["weak scaling, 32-true"][0].marks
    assert (five.low is None, one.low is None, one.samples) == (False, False, ())
    assert efficiency.panels["weak scaling, 32-true"][0].marks[1].low is not None
    few, _, efficiency = sweep_of(cells_of([*launches(4, 1), *launches(1, 2)])).plots
    assert [mark.low for mark in few.panels["weak scaling, 32-true"][0].marks] == [None, None]
    assert efficiency.panels["weak scaling, 32-true"][0].marks[1].low is None
    assert "Bars" not in few.caption


def test_launches_of_an_efficiency_are_compared_with_the_baseline() -> None:
    *_, efficiency = sweep_of(cells_of([strong(0.1, 1), *(
        strong(step_s, 2, f"{step_s}.json") for step_s in (0.0625, 0.05)
    )])).plots  # fmt: skip
    mark = efficiency.panels["strong scaling, 32-true"][0].marks[1]
    assert sorted(round(launch, 6) for launch in mark.samples) == [0.8, 1.0]


def test_a_panel_has_six_lines_at_most_and_the_caption_gives_the_rule() -> None:
    sizes = (1, 2, 3, 4, 5, 6, 7)
    runs = [run for n in (1, 2) for size in sizes for run in launches(1, n, batch_size=size)]
    plots = {plot.name: plot for plot in sweep_of(cells_of(runs)).plots}
    speed, memory = plots["gpt-s-speed-by-devices"], plots["gpt-s-memory-by-devices"]
    weak = [label for panel, label in lines(speed) if panel.startswith("weak")]
    assert weak == ["ddp, 7", "ddp, 6", "ddp, 5", "ddp, 4", "ddp, 3", "ddp, 2"]
    assert "Of up to 7 lines, the 6 fastest at the right end are shown." in speed.caption
    assert "Of up to 7 lines, the 6 smallest at the right end are shown." in memory.caption
    assert len(lines(plots["gpt-s-speed-by-batch"])) == 2
    assert "Only" not in plots["gpt-s-speed-by-batch"].caption


def test_colours_give_strategies_markers_batch_sizes_and_panels_precisions() -> None:
    runs = [
        make_spread(0.1, f"{n}-{size}-{strategy}-{precision}.json", devices=n, batch_size=size,
                    strategy=strategy, precision=precision)
        for n in (1, 2)
        for size in (2, 4)
        for strategy in ("ddp", "fsdp")
        for precision in ("32-true", "bf16-mixed")
    ]  # fmt: skip
    plots = {plot.name: plot for plot in sweep_of(cells_of(runs)).plots}
    speed = plots["gpt-s-speed-by-devices"]
    weak = {name: panel for name, panel in speed.panels.items() if name.startswith("weak")}
    assert list(weak) == ["weak scaling, 32-true", "weak scaling, bf16-mixed"]
    assert speed.markers["batch size: 2"] != speed.markers["batch size: 4"]
    for panel in weak.values():
        assert {
            (line.label, line.color, line.marker) for line in panel if line.label != "ideal"
        } == {
            (f"{strategy}, {size}", COLORS[strategy], speed.markers[f"batch size: {size}"])
            for strategy in ("ddp", "fsdp")
            for size in (2, 4)
        }
    assert set(COLORS) == set(get_args(Strategy))
    assert len(set(COLORS.values())) == len(COLORS)


def test_the_ideal_speed_is_that_of_the_fastest_line() -> None:
    (speed, *_) = sweep_of(cells_of([strong(0.1, 1), strong(0.0625, 2)])).plots
    line, ideal = speed.panels["strong scaling, 32-true"]
    # 8 samples of 8 tokens in 0.1 s, then in 0.0625 s; the ideal is 0.05 s.
    assert [round(mark.value) for mark in line.marks] == [640, 1024]
    assert [round(mark.value) for mark in ideal.marks] == [640, 1280]
    first = (
        "Dashed: ideal scaling from the first point of the line that is fastest at the right end."
    )
    assert first in speed.caption


def test_runs_that_cannot_be_drawn_are_listed_under_the_plots() -> None:
    runs = [*(strong(0.1, n) for n in (1, 2)), strong(0.1, 4, steps=3)]
    cells = cells_of(runs)
    lost = replace(cells[0], run=None, outcome=replace(cells[0].outcome, status="oom"))
    assert not_drawn(sweep_of(cells[:2])) == ""
    assert not_drawn(sweep_of([lost, *cells])) == (
        "Not in the plots, of 4 cells: 1 oom, 1 without a steady state; the table gives reasons."
    )


def ideal(plot: Plot) -> list[tuple[float, float]]:
    (panel,) = plot.panels.values()
    return [(mark.x, mark.value) for line in panel if line.label == "ideal" for mark in line.marks]


def test_the_ideal_line_on_the_same_cores_falls_with_threads_per_rank() -> None:
    def efficiency(threads: dict[int, int]) -> Plot:
        runs = [
            strong(0.1, n, changes={"hardware": [HOST | {"threads": count}] * n})
            for n, count in threads.items()
        ]
        (found,) = [p for p in sweep_of(cells_of(runs)).plots if "efficiency" in p.name]
        return found

    split, whole = efficiency({1: 4, 2: 2, 4: 1}), efficiency({1: 2, 2: 2})
    assert ideal(split) == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert split.y == "efficiency (1 = linear speed-up)"
    assert "All ranks share the cores of one machine" in split.caption
    assert (ideal(whole), whole.y) == ([(1, 1.0), (2, 1.0)], "efficiency (1 = ideal)")


def test_a_missing_or_damaged_record_leaves_its_row(tmp_path: Path) -> None:
    store = swept(tmp_path)
    lost = next(cell for cell in store.cells if cell.outcome.status == "ok")
    (record,) = [
        p for p in (tmp_path / lost.name).parent.glob("*.json") if p.name != "outcome.json"
    ]
    record.unlink()
    text = text_of(load_store([tmp_path], relative_to=tmp_path))
    assert text.count("its record is missing or damaged") == 2, "of a configuration, of a launch"


def test_a_run_whose_cell_did_not_end_well_is_no_measurement(tmp_path: Path) -> None:
    """The run wrote its record and then hung, so that its cell is a timeout."""
    store = swept(tmp_path)
    cell = next(cell for cell in store.cells if cell.run is not None and cell.run.is_ok)
    assert cell.run is not None
    hung = replace(cell, outcome=replace(cell.outcome, status="timeout", reason="did not end"))
    store = replace(store, cells=tuple(hung if c is cell else c for c in store.cells))
    analysis = StoreAnalysis(store)
    measured = {run.name for point in analysis.points["gpt"] for run in point.runs}
    assert len(measured) == 5, "four cells and a single run"
    assert cell.run.name not in measured
    assert cell.run.name not in {run.name for run in analysis.runs["gpt"]}
    predicted, _ = analysis.predictions
    assert cell.run.name not in {run.name for item in predicted for run in item.runs}
    (row,) = [row for row in rows(store) if row.record == cell.run.name]
    assert (row.status, row.units_per_s, row.reason) == ("timeout", None, "did not end")
    assert not list(check_rows(rows(store), store.successful_runs))
    config = cell.run.config
    (tried,) = [
        tried
        for (_, batch), tried in find_tried(store.runs, store.cells).items()
        if tried.config.parallel == config.parallel and batch == config.global_batch_size
    ]
    assert tried.missing == {"single": "timeout"}


def test_a_record_of_an_unfinished_cell_is_not_a_separate_run(tmp_path: Path) -> None:
    store = swept(tmp_path)
    ended = next(cell for cell in store.cells if cell.run is not None and cell.run.is_ok)
    (tmp_path / ended.name).unlink()
    again = load_store([tmp_path], relative_to=tmp_path)
    assert [run.name for run in again.single_runs] == [run.name for run in store.single_runs]
    (left,) = [file for file in again.left_out if "under way" in file.reason]
    assert ended.run is not None
    assert left.name == ended.run.name
    assert re.search(r"more files? ignored: not finished runs", text_of(again))


def test_cells_of_two_machine_types_are_two_lines_with_a_note(tmp_path: Path) -> None:
    store = swept(tmp_path)
    first, *_ = [cell.run for cell in store.cells if cell.run is not None and cell.run.is_ok]
    assert first is not None
    moved = first.record | {
        "hardware": [{**host, "cpu": "Another 1"} for host in first.record["hardware"]]
    }
    assert processors_of(moved) != processors_of(first.record)
    assert len(set(conditions_of([moved, first.record]))) == 2
    assert processors_of(without_threads(first.record)) == processors_of(first.record)
    other = replace(first, record=moved)
    assert len(pool([first, other])) == 2
    assert "processors and devices differ" in conditions_of_rows([first.record, moved])[0]
