"""Tests the plan of a sweep for a hardware that is not here."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from scaling.__main__ import main
from scaling.prediction.hardware import load_hardware
from scaling.sweep.hardware_plan import plan_cells, render_cells
from tests.builders.sweeps import make_study

NODE = load_hardware("h100-sxm-8")


def test_totals_are_sums_over_cells_that_fit_and_their_repeats() -> None:
    axes = {"size": ["1.3b", "13b"], "strategy": ["ddp", "fsdp"], "batch-size": ["1"]}
    cells = plan_cells(make_study(axes=axes, repeats=2), NODE)
    fits = {
        (c.cell.options["size"], c.cell.options["strategy"]): c.prediction.fits
        for c in cells
        if c.prediction
    }
    assert fits[("13b", "ddp")] is False  # its states take 208 GB
    text = render_cells(cells, NODE, price_per_hour=2.0)
    hours = sum(2 * c.prediction.run_s.low for c in cells if c.prediction and c.prediction.fits)
    totals = text.split("\n\n")[0].splitlines()
    assert totals[0] == "4 cells on h100-sxm-8: 3 fit (6 launches), 1 will not fit"
    assert f"{8 * hours / 3600:,.3g} to " in totals[2]
    assert f"{8 * hours / 3600 * 2.0:,.2f} to " in totals[2]
    assert "USD at 2.00 each: for the steps alone" in totals[2]
    # A minute on 8 devices in 6 cells is 0.8 hours.
    assert totals[3].endswith("in every launch adds 0.8 device-hours, 1.60 USD")
    assert "does not fit" not in text
    of_13b = text.split("\n\n")[2].splitlines()
    assert of_13b[0] == "gpt 13b: 1 cell, fastest first"
    assert of_13b[3].startswith("fsdp ")  # named, though ddp does not fit
    listed = render_cells(cells, NODE, price_per_hour=2.0, is_list=True)
    assert listed.startswith(text.rpartition("\n\n")[0])
    assert "does not fit: it needs" in listed
    assert all(planned.cell.command in listed for planned in cells)


def test_a_short_table_ranks_the_cells_of_a_model_by_speed() -> None:
    axes = {"size": ["1.3b"], "batch-size": ["1", "2", "4"], "strategy": ["ddp", "fsdp"]}
    cells = plan_cells(make_study(axes=axes), NODE)
    text = render_cells(cells, NODE, price_per_hour=None)
    title, header, _, *rows = text.split("\n\n")[1].splitlines()
    assert title == "gpt 1.3b: the fastest 5 of 6 cells, fastest first"
    assert header.split()[:2] == ["batch-size", "strategy"]  # size is the same in all rows
    speeds = [p.units_per_s.value for cell in cells if (p := cell.prediction) is not None]
    best = sorted(speeds, reverse=True)[:5]
    assert [row.split()[2] for row in rows] == [f"{speed:,.0f}" for speed in best]


def test_an_extrapolation_says_what_is_beyond_the_fit() -> None:
    axes = {"size": ["1.3b"], "strategy": ["ddp"], "batch-size": ["2"], "devices": ["1", "2", "8"]}
    cells = plan_cells(make_study(axes=axes), NODE)
    text = render_cells(cells, NODE, price_per_hour=None)
    assert "extrapolated, so that only the interval is shown: 1 cell with devices 1, more" in text
    assert re.search(r"devices 1, more than 4 times beyond the 8 to [\d,]+ of the fit", text)


def test_devices_and_strategy_are_those_of_the_hardware() -> None:
    (cell,) = plan_cells(make_study(axes={"size": ["1.3b"], "batch-size": ["1"]}), NODE)
    assert cell.prediction is not None
    parallel = cell.prediction.config.parallel
    assert (parallel.accelerator, parallel.devices, parallel.strategy) == ("cuda", 8, "ddp")
    (large,) = plan_cells(make_study(axes={"size": ["13b"], "batch-size": ["1"]}), NODE)
    assert large.prediction is not None
    assert large.prediction.config.parallel.strategy == "fsdp"
    single = plan_cells(make_study(axes={"strategy": ["single"]}), NODE)[0].prediction
    assert single is not None
    assert single.config.parallel.world_size == 1


def test_any_devices_of_a_node_talk_over_its_links() -> None:
    axes = {"size": ["1.3b"], "strategy": ["fsdp"], "devices": ["2", "3", "4"]}
    found = [cell.prediction for cell in plan_cells(make_study(axes=axes), NODE)]
    hidden = [p.time.hidden_communication_s for p in found if p is not None]
    assert hidden == sorted(hidden)
    assert len(hidden) == 3


def test_nodes_of_fewer_devices_talk_over_the_slower_link() -> None:
    axes = {"size": ["1.3b"], "strategy": ["ddp"], "devices": ["4"], "num-nodes": ["1", "2"]}
    one, two = (cell.prediction for cell in plan_cells(make_study(axes=axes), NODE))
    assert one is not None
    assert two is not None
    assert two.hardware == replace(NODE, devices_per_node=4)
    assert two.time.hidden_communication_s > 2 * one.time.hidden_communication_s


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"devices": ["16"]}, "devices is 16, and a node of h100-sxm-8 has 8; give at most 8"),
        ({"accelerator": ["cpu"]}, "accelerator is cpu, which h100-sxm-8 is not"),
        ({"num-nodes": ["4096"]}, "num-nodes is 4096, with 32,768 devices; predictions reach"),
        ({"batch-size": ["0"]}, "batch-size is 0; it must be at least 1"),
    ],
)
def test_a_cell_that_cannot_run_there_is_refused(axes: dict[str, list[str]], reason: str) -> None:
    with pytest.raises(ValueError, match=f"no cell can run on h100-sxm-8: {reason}"):
        plan_cells(make_study(axes=axes), NODE)


def test_the_other_cells_are_planned_beside_a_refused_one() -> None:
    cells = plan_cells(make_study(axes={"batch-size": ["1"], "devices": ["8", "16"]}), NODE)
    text = render_cells(cells, NODE, price_per_hour=None)
    assert "refused, 1 cell: devices is 16" in text
    assert "2 cells on h100-sxm-8: 1 fit, 0 will not fit, 1 refused" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--recipe gpt --hardware h100-sxm-8", "hardware is h100-sxm-8, but a sweep runs on this"),
        ("--recipe gpt --dry-run --hardware h100", "did you mean h100-sxm-8?"),
        ("--recipe gpt --dry-run --hardware h100-sxm-8 --sise 1b", "did you mean --size"),
        ("--recipe gpt --dry-run --hardware h100-sxm-8 --price-per-hour -1", "price-per-hour is"),
    ],
)
def test_a_bad_option_is_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *line.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_dry_run_refuses_a_folder_that_cannot_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = "sweep --recipe gpt --batch-size 1,2 --dry-run --hardware h100-sxm-8 --out"
    assert main([*line.split(), str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: out ")
