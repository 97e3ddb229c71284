"""Tests the plots of predictions: which lines, what is measured, and that pages load nothing."""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from scaling.__main__ import main
from scaling.prediction.best import usable_bytes
from scaling.prediction.hardware import load_hardware
from scaling.prediction.measured_rows import model_for
from scaling.prediction.options import build_configs
from scaling.prediction.plots import COLORS, curves_of, panels_of
from scaling.prediction.predict import Prediction, predict
from unitransformer.config import Strategy

NODE = load_hardware("h100-sxm-8")
AXES = {"size": ["1.3b"], "strategy": ["ddp", "fsdp"], "batch-size": ["1", "4"]}


@pytest.fixture(scope="module")
def predictions() -> list[Prediction]:
    configs, _ = build_configs("gpt", (8, 64), AXES, NODE)
    return [predict(config, NODE, model_for(NODE)) for config in configs]


def keys_of(predictions: list[Prediction]) -> list[str]:
    return [f"{p.config.parallel.strategy}, batch {p.config.batch_size}" for p in predictions]


def test_a_line_is_a_combination_by_ascending_devices(predictions: list[Prediction]) -> None:
    curves = curves_of(predictions[::-1], keys_of(predictions[::-1]))
    assert {key for curve in curves for key in keys_of(curve)} == set(keys_of(predictions))
    for curve in curves:
        assert [p.config.parallel.world_size for p in curve] == [8, 64]
        assert len(set(keys_of(curve))) == 1


def test_a_line_of_several_combinations_is_the_fastest(predictions: list[Prediction]) -> None:
    curves = curves_of(predictions, [p.config.parallel.strategy for p in predictions])
    assert sorted(curve[0].config.parallel.strategy for curve in curves) == ["ddp", "fsdp"]
    assert {p.config.batch_size for curve in curves for p in curve} == {4}


def test_a_strategy_has_its_color_and_only_the_fastest_of_many_lines_a_band(
    predictions: list[Prediction],
) -> None:
    curves = {keys_of(curve)[0]: curve for curve in curves_of(predictions, keys_of(predictions))}
    speed, efficiency, _, cost = panels_of(curves, None, None)
    for panel in (efficiency, cost):
        for line in panel.lines:
            assert line.color == COLORS[line.label.partition(",")[0]]
        assert len({(line.color, line.style) for line in panel.lines}) == 4
        assert [line.marks[0].low is not None for line in panel.lines] == [True] + [False] * 3
    (fastest,) = speed.lines
    for mark in fastest.marks:
        on_as_many = [p for p in predictions if p.config.parallel.world_size == mark.x]
        assert mark.value == max(p.units_per_s.value for p in on_as_many)
    assert set(COLORS) == set(get_args(Strategy)) - {"auto"}


def test_an_extrapolation_is_drawn_with_its_interval_on_every_line() -> None:
    axes = {"size": ["1.3b"], "strategy": ["ddp", "fsdp", "zero2"], "batch-size": ["4"]}
    configs, _ = build_configs("gpt", (8, 64, 512, 4096), axes, NODE)
    found = [predict(config, NODE, model_for(NODE)) for config in configs]
    curves = {keys_of(curve)[0]: curve for curve in curves_of(found, keys_of(found))}
    for panel in panels_of(curves, None, None)[1::2]:
        best, *others = panel.lines
        assert all(mark.low is not None for mark in best.marks)
        for line in others:  # from the last point of the fit on
            assert [mark.is_known for mark in line.marks] == [True, True, True, False]
            assert [mark.low is not None for mark in line.marks] == [False, False, True, True]


@pytest.mark.parametrize(("devices", "is_logarithmic"), [((8, 16), False), ((8, 512), True)])
def test_the_axis_of_the_speed_has_ticks(devices: tuple[int, ...], is_logarithmic: bool) -> None:
    axes = {"size": ["1.3b"], "strategy": ["fsdp"], "batch-size": ["4"]}
    configs, _ = build_configs("gpt", devices, axes, NODE)
    found = [predict(config, NODE, model_for(NODE)) for config in configs]
    speed = panels_of({"fsdp": found}, None, None)[0]
    # A logarithmic axis has ticks at powers of ten alone, of which 8 and 16 devices reach one.
    assert speed.is_logarithmic == is_logarithmic


def test_points_have_intervals_and_measured_ones_a_dot(predictions: list[Prediction]) -> None:
    kinds = ("measured", "extrapolated")
    two = [
        p for p in predictions if p.config.parallel.strategy == "ddp" and p.config.batch_size == 1
    ]
    two = [
        replace(p, time=replace(p.time, provenance=kind))
        for p, kind in zip(two, kinds, strict=True)
    ]
    speed, efficiency, memory, cost = panels_of({"ddp": two}, tokens=2e9, price=3.0)
    for panel in (speed, efficiency, cost):
        measured, extrapolated = panel.lines[0].marks
        assert measured.samples == (measured.value,)
        assert extrapolated.samples == ()
        assert (measured.is_known, extrapolated.is_known) == (True, False)
        assert measured.low is not None
        assert measured.high is not None
        assert measured.low < measured.value < measured.high
    assert cost.title == "cost of 2 billion tokens (USD)"
    hours = 2e9 / two[0].units_per_s.value / 3600
    assert cost.lines[0].marks[0].value == pytest.approx(8 * hours * 3.0)
    states, limit = memory.lines
    assert states.marks[0].value == two[0].memory.total_bytes / 2**30
    assert limit.marks[0].value == usable_bytes(NODE) / 2**30


def test_files_are_whole_and_the_page_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, page = tmp_path / "new" / "plot.png", tmp_path / "page.html"
    line = f"predict --recipe gpt --hardware h100-sxm-8 --devices 1,8 --plot {plot} --html {page}"
    assert main([*line.split(), "--batch-size", "1", "--size", "124m"]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    # The answer comes first, as a table.
    assert text.index("fastest that fits") < text.index("<th>devices</th>") < text.index("<svg")
    assert text.index("<svg") < text.index("every configuration")
    assert "<pre" not in text
    assert f"<p>$ python -m scaling {line} --batch-size 1 --size 124m</p>" in text
    assert re.search(r"<p>unitransformer \d\S+, \d{4}-\d\d-\d\d</p>", text)
    assert not re.search(r"<(script|img|link)|(?<!:)\b(src|href)=\"(?!#)", text)


@pytest.mark.parametrize("given", ["--size 124m --batch-size 1", "--size 13b --strategy ddp"])
def test_the_page_has_no_plot_of_one_number_of_devices_or_where_nothing_fits(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    line = f"predict --recipe gpt --hardware h100-sxm-8 --devices 8 --html {page} {given}"
    assert main(line.split()) == 0
    text = page.read_text()
    assert "every configuration" in text
    assert "<svg" not in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--plot plot.pdf", "plot is plot.pdf; give a file that ends in .svg or .png"),
        ("--plot a.svg --html a.svg", "html is a.svg, and so is plot; give them different files"),
        ("--plot plot.svg --devices 8", "devices is 8, and --plot draws over several"),
        ("--html .", "html . is a folder"),
        ("--html /proc/page.html", "/proc cannot be written (it takes no new files)"),
        ("--plot a.svg --size 13b --strategy ddp --batch-size 1", "nothing fits on a device"),
    ],
)
def test_a_bad_option_is_one_line(
    given: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "predict --recipe gpt --hardware h100-sxm-8"
    assert main([*line.split(), *given.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
