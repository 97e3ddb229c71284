"""Cells of a sweep in the report: every one a row, plots where there is something to plot."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_efficiency import make_spread, strong
from test_store import HOST, make_record
from test_sweep import Straw, make_study, make_tasks, work

from scaling.analysis.efficiency import pool
from scaling.report.environment import apart
from scaling.report.plots import Plot, not_drawn, plots_of
from scaling.report.results_md import draw_plots, render_pages
from scaling.report.sections.sweep import sweep_blocks
from scaling.store.conditions import conditions_of, processors_of, without_threads
from scaling.store.outcome import Outcome
from scaling.store.reader import Cell, Store, load_store
from scaling.store.run import Run
from unitransformer.config import DataConfig, ParallelConfig
from unitransformer.record.schema import write_record


def swept(folder: Path) -> Store:
    """Ten cells, half of them out of memory, and a run beside them."""
    work(folder / "night", make_tasks(make_study()))
    write_record(make_record("gpt"), folder / "single" / "a-1.json")
    return load_store([folder], relative_to=folder)


def render(store: Store) -> str:
    """All pages, RESULTS.md first."""
    return "\n".join(pages_of(store).values())


def pages_of(store: Store) -> dict[str, str]:
    pages = render_pages(store, command="python -m scaling report .", plots="plots", pages="pages")
    return {path.name: text for path, text in pages.items()}


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
    return sweep_blocks(cells, [], [], {})


def table_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of the configurations of a sweep."""
    block, _ = [b for b in blocks_of(cells) if b.startswith("|")]
    heads, _, *rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()
    ]
    return heads, rows


def test_the_table_leaves_out_what_is_empty_in_all_rows_and_says_what_all_cells_share() -> None:
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
    assert "No MFU: a CPU has no published peak; its measured ceiling stands." in blocks


def test_the_table_tells_the_efficiency_of_each_row_against_its_baseline() -> None:
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


def test_where_memory_ran_out_the_largest_batch_that_ran_has_a_row(tmp_path: Path) -> None:
    cells = swept(tmp_path).cells
    blocks = blocks_of(cells)
    (table,) = [block for block in blocks if re.match(r"\|.* does not fit", block)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    told = [(precision, fits.split(",")[0], not_) for precision, fits, not_ in rows]
    assert told == [("32-true", "16", "32, oom"), ("bf16-true", "32", "64, oom")]
    assert not any("does not fit" in b for b in blocks_of(cells_of([strong(0.1, 1)])))


def test_runs_of_a_sweep_are_not_told_a_second_time(tmp_path: Path) -> None:
    store = swept(tmp_path)
    assert [run.name for run in store.single_runs] == ["single/a-1.json"]
    text = render(store)
    assert "### All runs" not in text
    assert "single/a-1.json" in text.split("# Single runs")[1].split("### Architecture")[0]


def test_a_recipe_that_was_only_swept_has_its_section_too(tmp_path: Path) -> None:
    work(tmp_path / "night", make_tasks(make_study()))
    text = render(load_store([tmp_path], relative_to=tmp_path))
    assert "<summary>Parameters</summary>" in text
    assert "# Sweep night" in text


def test_a_recipe_of_which_no_cell_ended_well_is_told(tmp_path: Path) -> None:
    work(tmp_path / "night", make_tasks(make_study()), straw=Straw({}, capacity=1))
    text = render(load_store([tmp_path], relative_to=tmp_path))
    assert "## GPT" in text
    assert "10 configurations, 10 launches: 1 oom, 9 oom-inferred." in text


def test_two_sweeps_of_one_name_have_plots_of_their_own(tmp_path: Path) -> None:
    for place, sizes in (("x", ["8", "16"]), ("y", ["9", "17"])):
        (tmp_path / place).mkdir()
        axes = {"precision": "32-true", "batch-size": sizes}
        work(tmp_path / place / "night", make_tasks(make_study(axes=axes)))
    store = load_store([tmp_path], relative_to=tmp_path)
    drawn = draw_plots(store)
    assert {"gpt-night-1-speed-by-batch.svg", "gpt-night-2-speed-by-batch.svg"} <= set(drawn)
    text = render(store)
    assert "# Sweep night 1" in text
    assert "# Sweep night 2" in text
    assert {"night-1.md", "night-2.md"} <= set(pages_of(store))


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
    assert set(re.findall(r"\((?:\.\./)?plots/([^)]+)\)", text)) == set(drawn)
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


def cells_of(runs: Sequence[Run]) -> list[Cell]:
    """A cell of a sweep for each run."""
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
def test_runs_that_differ_in_anything_else_are_two_lines(
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


def test_other_machines_and_offloaded_states_are_lines_of_their_own() -> None:
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


def test_what_cannot_be_drawn_is_told_under_the_plots() -> None:
    runs = [*(strong(0.1, n) for n in (1, 2)), strong(0.1, 4, steps=3)]
    cells = cells_of(runs)
    lost = replace(cells[0], run=None, outcome=replace(cells[0].outcome, status="oom"))
    assert not_drawn(cells[:2]) == ""
    assert not_drawn([lost, *cells]) == (
        "Not in the plots, of 4 cells: 1 oom, 1 without a steady state; the table tells why."
    )


def test_on_the_same_cores_the_line_of_no_loss_falls_with_the_threads_of_a_rank() -> None:
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


def test_a_record_that_is_gone_or_damaged_leaves_its_row(tmp_path: Path) -> None:
    store = swept(tmp_path)
    lost = next(cell for cell in store.cells if cell.outcome.status == "ok")
    (record,) = [
        p for p in (tmp_path / lost.name).parent.glob("*.json") if p.name != "outcome.json"
    ]
    record.unlink()
    text = render(load_store([tmp_path], relative_to=tmp_path))
    assert text.count("its record is missing or damaged") == 2, "of a configuration, of a launch"


def test_a_record_of_a_cell_that_is_under_way_is_no_run_of_its_own(tmp_path: Path) -> None:
    store = swept(tmp_path)
    ended = next(cell for cell in store.cells if cell.run is not None and cell.run.is_ok)
    (tmp_path / ended.name).unlink()
    again = load_store([tmp_path], relative_to=tmp_path)
    assert [run.name for run in again.single_runs] == [run.name for run in store.single_runs]
    (left,) = [file for file in again.left_out if "under way" in file.reason]
    assert ended.run is not None
    assert left.name == ended.run.name
    assert re.search(r"more files? ignored: not finished runs", render(again))


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
