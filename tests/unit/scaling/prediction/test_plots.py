"""Tests the plots of predictions: which lines, what is measured, and that pages load nothing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from scaling.__main__ import main
from scaling.prediction.hardware import load_hardware
from scaling.prediction.measured_rows import model_for
from scaling.prediction.options import build_configs
from scaling.prediction.plots import curves_of, panels_of
from scaling.prediction.predict import Prediction, predict

NODE = load_hardware("h100-sxm-8")
AXES = {"size": ["1.3b"], "strategy": ["ddp", "fsdp"], "batch-size": ["1", "4"]}


@pytest.fixture(scope="module")
def predictions() -> list[Prediction]:
    configs, _ = build_configs("gpt", (8, 64), AXES, NODE)
    return [predict(config, NODE, model_for(NODE)) for config in configs]


def labels_of(predictions: list[Prediction]) -> tuple[list[str], list[str]]:
    short = [p.config.parallel.strategy for p in predictions]
    return [
        f"{p.config.parallel.strategy}, batch {p.config.batch_size}" for p in predictions
    ], short


def test_a_line_is_a_combination_by_ascending_devices(predictions: list[Prediction]) -> None:
    curves = curves_of(predictions[::-1], *labels_of(predictions[::-1]))
    assert set(curves) == {f"{s}, batch {b}" for s in ("ddp", "fsdp") for b in (1, 4)}
    for curve in curves.values():
        assert [p.config.parallel.world_size for p in curve] == [8, 64]


def test_of_many_lines_the_fastest_of_each_strategy_remain(predictions: list[Prediction]) -> None:
    _, short = labels_of(predictions)
    curves = curves_of(predictions, [str(i) for i in range(len(predictions))], short)
    assert set(curves) == {"ddp, fastest", "fsdp, fastest"}
    assert {p.config.batch_size for curve in curves.values() for p in curve} == {4}


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
    assert limit.marks[0].value == NODE.memory_bytes / 2**30


def test_files_are_whole_and_the_page_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, page = tmp_path / "new" / "plot.png", tmp_path / "page.html"
    line = f"predict --recipe gpt --hardware h100-sxm-8 --devices 1,8 --plot {plot} --html {page}"
    assert main([*line.split(), "--batch-size", "1", "--size", "124m"]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "<svg" in text
    assert "fastest that fits" in text
    assert not re.search(r"<(script|img|link)|(?<!:)\b(src|href)=\"(?!#)", text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--plot plot.pdf", "plot is plot.pdf; give a file that ends in .svg or .png"),
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
