"""Tests sweep cells in the report: a row for each, and plots along axes with several values."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from scaling.analysis.efficiency import pool
from scaling.report.environment import apart
from scaling.report.plots import Plot, not_drawn, plots_of
from scaling.report.results_md import draw_plots, render_report
from scaling.report.sections.sweep import sweep_blocks
from scaling.store.conditions import conditions_of, processors_of, without_threads
from scaling.store.outcome import Outcome
from scaling.store.reader import Cell, Store, load_store
from scaling.store.run import Run
from tests.builders.records import HOST, make_record
from tests.builders.runs import make_spread, strong
from tests.builders.sweeps import FakeMachine, make_study, make_tasks, work
from unitransformer.config import DataConfig, ParallelConfig
from unitransformer.record.schema import write_record


def swept(folder: Path) -> Store:
    """Ten cells, half of them out of memory, and a run outside of the sweep."""
    work(folder / "night", make_tasks(make_study()))
    write_record(make_record("gpt"), folder / "single" / "a-1.json")
    return load_store([folder], relative_to=folder)


def render(store: Store) -> str:
    return render_report(store, command="python -m scaling report .", plots="plots")


def test_every_cell_is_a_row_with_its_status_and_command(tmp_path: Path) -> None:
    store = swept(tmp_path)
    text = render(store)
    (section,) = re.findall(r"### Sweep night\n(.*?)(?=\n##|\Z)", text, flags=re.DOTALL)
    table = section.split("**Largest batch")[0].splitlines()
    rows = [line.split("|")[1:4] for line in table if line.startswith("| ")][1:]
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


def table_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of a sweep."""
    (block,) = [b for b in sweep_blocks("s", cells, [], []) if b.startswith("|")]
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
    assert {"speed", "record", "devices"} <= set(heads)
    blocks = sweep_blocks("s", cells, [], [])
    about = "a model of 6.1 K parameters (2 layers of width 16), dropout 0"
    assert f"All cells: {about}." in blocks
    assert "No MFU: a CPU has no published peak; its measured ceiling stands." in blocks


def test_the_table_shows_the_efficiency_of_each_row() -> None:
    heads, rows = table_of(cells_of([strong(0.1, 1), strong(0.0625, 2)]))
    assert [row[heads.index("strong efficiency")] for row in rows] == [
        "baseline",
        "80.0% (80.0% to 80.0%)",
    ]
    assert "weak efficiency" not in heads
    split = [strong(0.1, n, changes={"hardware": [HOST | {"threads": 2 // n}] * n}) for n in (1, 2)]
    heads, rows = table_of(cells_of(split))
    column = heads.index("strong efficiency (same cores: 1/n loses nothing)")
    assert rows[1][column].startswith("50.0%")


def test_the_largest_batch_below_out_of_memory_has_a_row(tmp_path: Path) -> None:
    cells = swept(tmp_path).cells
    blocks = sweep_blocks("night", cells, [], [])
    (table,) = [block for block in blocks if re.match(r"\|.* does not fit", block)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    told = [(precision, fits.split(",")[0], not_) for precision, fits, not_ in rows]
    assert told == [("32-true", "16", "32, oom"), ("bf16-true", "32", "64, oom")]
    assert not any(
        "does not fit" in b for b in sweep_blocks("s", cells_of([strong(0.1, 1)]), [], [])
    )


def test_runs_of_a_sweep_are_not_listed_twice(tmp_path: Path) -> None:
    store = swept(tmp_path)
    assert [run.name for run in store.single_runs] == ["single/a-1.json"]
    text = render(store)
    assert "### All runs" not in text
    assert "single/a-1.json" in text.split("## GPT")[1].split("### Architecture")[0]


def test_a_recipe_with_only_sweep_runs_has_a_section(tmp_path: Path) -> None:
    work(tmp_path / "night", make_tasks(make_study()))
    text = render(load_store([tmp_path], relative_to=tmp_path))
    assert "### Parameters" in text
    assert "### Sweep night" in text


def test_a_recipe_without_a_successful_cell_is_reported(tmp_path: Path) -> None:
    work(tmp_path / "night", make_tasks(make_study()), machine=FakeMachine({}, capacity=1))
    text = render(load_store([tmp_path], relative_to=tmp_path))
    assert "## GPT" in text
    assert "10 cells: 1 oom, 9 oom-inferred." in text


def test_two_sweeps_of_one_name_have_separate_plots(tmp_path: Path) -> None:
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


def test_efficiency_is_plotted_if_device_counts_differ(tmp_path: Path) -> None:
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
    # Equal steps with twice the batch on twice the devices: no time is lost.
    assert [(x, round(told.value, 6)) for x, told in marks] == [(1, 1.0), (2, 1.0)]


def cells_of(runs: Sequence[Run]) -> list[Cell]:
    """One sweep cell per run."""
    return [
        Cell(
            name=f"s/cells/{number:012x}-1/outcome.json",
            outcome=Outcome(
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
    return {
        (panel, line): [x for x, _ in marks]
        for panel, own in plot.panels.items()
        for line, marks in own.items()
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": DataConfig(sequence_length=4)}, "sequence length 4"),
        ({"accumulate": 2}, "accumulate 2"),
        ({"loss_chunk": 8}, "loss chunk 8"),
        ({"seed": 1}, "seed 1"),
    ],
)
def test_runs_that_differ_in_another_setting_are_two_lines(
    change: dict[str, object], told: str
) -> None:
    plain = [make_spread(0.1, f"{size}.json", batch_size=size) for size in (2, 4)]
    other = [
        replace(run, config=replace(run.config, **change), name=f"other-{run.name}")
        for run in plain
    ]
    (speed, _) = plots_of("s", cells_of([*plain, *other]))
    found = lines(speed)
    assert list(found.values()) == [[2, 4], [2, 4]]
    assert any(line.endswith(told) for _, line in found)


def test_other_machines_and_cpu_offload_are_separate_lines() -> None:
    spread = {"strategy": "fsdp", "accelerator": "cuda"}
    runs = [
        make_spread(0.1, f"{n}-{off}.json", devices=n, cpu_offload=off, **spread)
        for n in (1, 2)
        for off in (False, True)
    ]
    by_devices = [plot for plot in plots_of("s", cells_of(runs)) if "speed" in plot.name]
    assert list(by_devices[0].panels) == [
        "32-true, offloaded to the host no, 6.1 K parameters",
        "32-true, offloaded to the host yes, 6.1 K parameters",
    ]
    moved = [strong(0.1, n, f"b-{n}.json", changes={"hardware": [HOST | {"cpu": "B"}] * n})
             for n in (1, 2)]  # fmt: skip
    here = [strong(0.1, n, f"a-{n}.json") for n in (1, 2)]
    (plot,) = [p for p in plots_of("s", cells_of([*here, *moved])) if "speed" in p.name]
    assert sorted(line for _, line in lines(plot)) == [
        "ddp, batch 8 in all, machine 1",
        "ddp, batch 8 in all, machine 2",
    ]


def test_runs_that_cannot_be_drawn_are_listed_under_the_plots() -> None:
    runs = [*(strong(0.1, n) for n in (1, 2)), strong(0.1, 4, steps=3)]
    cells = cells_of(runs)
    lost = replace(cells[0], run=None, outcome=replace(cells[0].outcome, status="oom"))
    assert not_drawn(cells[:2]) == ""
    assert not_drawn([lost, *cells]) == (
        "Not in the plots, of 4 cells: 1 oom, 1 without a steady state; the table tells why."
    )


def test_the_ideal_line_on_the_same_cores_falls_with_threads_per_rank() -> None:
    def efficiency(threads: dict[int, int]) -> Plot:
        runs = [
            strong(0.1, n, changes={"hardware": [HOST | {"threads": own}] * n})
            for n, own in threads.items()
        ]
        (found,) = [p for p in plots_of("s", cells_of(runs)) if "efficiency" in p.name]
        return found

    split, whole = efficiency({1: 4, 2: 2, 4: 1}), efficiency({1: 2, 2: 2})
    assert split.ideals == [((1, 1.0), (2, 0.5), (4, 0.25))]
    assert split.y == "same cores: 1/n loses nothing"
    assert (whole.ideals, whole.y) == ([((1, 1.0), (2, 1.0))], "speed over the ideal one")


def test_a_missing_or_damaged_record_leaves_its_row(tmp_path: Path) -> None:
    store = swept(tmp_path)
    lost = next(cell for cell in store.cells if cell.outcome.status == "ok")
    (record,) = [
        p for p in (tmp_path / lost.name).parent.glob("*.json") if p.name != "outcome.json"
    ]
    record.unlink()
    text = render(load_store([tmp_path], relative_to=tmp_path))
    assert text.count("its record is missing or damaged") == 1


def test_a_record_of_an_unfinished_cell_is_not_a_separate_run(tmp_path: Path) -> None:
    store = swept(tmp_path)
    ended = next(cell for cell in store.cells if cell.run is not None and cell.run.is_ok)
    (tmp_path / ended.name).unlink()
    again = load_store([tmp_path], relative_to=tmp_path)
    assert [run.name for run in again.single_runs] == [run.name for run in store.single_runs]
    (left,) = [file for file in again.left_out if "under way" in file.reason]
    assert ended.run is not None
    assert left.name == ended.run.name
    assert re.search(r"more files?: not a finished run", render(again))


def test_cells_of_two_machine_types_are_two_lines_with_a_note(tmp_path: Path) -> None:
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
