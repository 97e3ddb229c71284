"""Tests figures: labels do not overlap, ticks stay readable, files are reproducible."""

import re
from itertools import pairwise

import pytest
from matplotlib.text import Text

from unitransformer.plots import (
    PlotLine,
    PlotPoint,
    figure_bytes,
    line_panels,
    loss_figure,
    spread_labels,
)


def test_labels_that_are_far_apart_stay_where_they_are() -> None:
    assert spread_labels([0.1, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.5, 0.9])


def test_labels_that_are_too_close_move_apart_around_their_mean() -> None:
    assert spread_labels([0.1, 0.5, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.4, 0.6, 0.9])


def test_labels_stay_inside_the_panel() -> None:
    assert spread_labels([1.0, 1.0, 1.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])
    assert spread_labels([0.0, 0.0], 0.1) == pytest.approx([0.0, 0.1])


def make_panels(num_lines: int, *, high: float | None = None) -> dict[str, list[PlotLine]]:
    """Lines over 1, 2, 4 devices that end at almost the same height."""
    return {
        panel: [
            PlotLine(
                label=f"ddp$, {index}",
                marker="o",
                marks=tuple(
                    PlotPoint(x=x, value=10 * x + 0.1 * index, low=high and 1.0, high=high)
                    for x in (1, 2, 4)
                ),
            )
            for index in range(num_lines)
        ]
        for panel in ("32-true", "bf16-mixed", "bf16-true")
    }


def test_panels_label_each_line_once_without_overlaps_and_share_their_axes() -> None:
    figure = line_panels(
        make_panels(6), title="GPT", caption="dots", x="devices", y="speed", markers={"8": "o"}
    )
    figure.draw_without_rendering()
    assert [axes.get_title() for axes in figure.axes] == ["32-true", "bf16-mixed", "bf16-true"]
    for axes in figure.axes:
        boxes = sorted(
            map(Text.get_window_extent, axes.texts), key=lambda box: box.y0
        )  # without leaders
        assert len(boxes) == 6
        assert all(upper.y0 >= lower.y0 + lower.height * 0.8 for lower, upper in pairwise(boxes))
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 40.5
    assert figure_bytes(figure, "svg").count(b"<svg") == 1


def test_equal_panels_and_losses_give_equal_files() -> None:
    def files() -> list[bytes]:
        panels = line_panels(
            make_panels(2), title="GPT", caption="", x="devices", y="speed", markers={"8": "o"}
        )
        losses = loss_figure([3.0, 2.0], [{"step": 2, "val_loss": 2.5}], title="GPT tiny")
        return [figure_bytes(panels, "svg"), figure_bytes(losses, "svg")]

    assert files() == files()


def test_an_interval_is_a_bar_of_its_mark() -> None:
    def num_paths(high: float | None) -> int:
        figure = line_panels(
            make_panels(1, high=high), title="", caption="", x="", y="", markers={"8": "o"}
        )
        return len(re.findall(rb"<path ", figure_bytes(figure, "svg")))

    # Three marks in each of three panels.
    assert num_paths(50.0) - num_paths(None) >= 9


def test_losses_are_labelled_at_their_ends_with_the_baseline_to_beat() -> None:
    figure = loss_figure(
        [3.0, 2.0, 1.0],
        [{"step": 2, "val_loss": 2.5}],
        title="GPT tiny",
        baseline=("unigram $ entropy", 2.2),
    )
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "GPT tiny: loss while training"
    assert {label.get_text() for label in axes.texts} == {
        *("training", "validation", r"to beat: unigram \$ entropy"),
    }
    assert axes.get_legend() is None
    figure_bytes(figure, "png")
