"""Tests the merged history of all ranks, and the errors for impossible steps."""

import math
from dataclasses import asdict, replace

import pytest

from unitransformer.measure.clock import StepTimes
from unitransformer.training.history import (
    CLOCK_FIELDS,
    ClockError,
    History,
    RankSteps,
    append_segment,
    find_fault,
    read_history,
)


def steps(*step_s: float) -> list[StepTimes]:
    return [
        StepTimes(step_s=s, cpu_s=2 * s, data_s=0.0, forward_backward_s=s, optimizer_s=0.0)
        for s in step_s
    ]


def rank_steps(loss: list[float], *step_s: float) -> RankSteps:
    return RankSteps(loss=loss, steps=steps(*step_s), gradient_norm=[])


def test_the_loss_is_the_mean_over_ranks_and_the_time_that_of_the_slowest() -> None:
    ranks = [rank_steps([1.0, 2.0], 0.1, 0.5), rank_steps([3.0, 4.0], 0.2, 0.4)]
    history = append_segment(History(), ranks, [])
    assert history.loss == [2.0, 3.0]
    assert history.step_s == [0.2, 0.5]
    assert history.slowest_rank == [1, 0]
    assert history.cpu_s == [0.4, 1.0], "of the rank that was slowest"


def test_history_keeps_communication_of_the_slowest_rank_and_the_minimum_over_ranks() -> None:
    def rank_steps(step_s: float, communication_s: float | None) -> RankSteps:
        step = replace(steps(step_s)[0], communication_s=communication_s)
        return RankSteps(loss=[1.0], steps=[step], gradient_norm=[])

    history = append_segment(History(), [rank_steps(0.5, 0.2), rank_steps(0.4, 0.1)], [])
    assert (history.communication_s, history.min_communication_s) == ([0.2], [0.1])
    missing = append_segment(History(), [rank_steps(0.5, None), rank_steps(0.4, 0.1)], [])
    assert (missing.communication_s, missing.min_communication_s) == ([None], [None])


def test_an_older_checkpoint_resumes_with_missing_samples_and_renamed_fields() -> None:
    actual = {"loss": [1.0, 1.0], "step_s": [0.1, 0.1], "launches": [0, 1], "between_s": [None, 2]}
    history = read_history(actual)
    assert history.communication_s == [None, None]
    assert history.between_steps_s == [None, 2]
    assert history.segment_starts == [0, 1]
    assert read_history(asdict(history)) == history
    assert read_history({}) == History()


def test_a_second_segment_continues_the_history_of_the_first() -> None:
    first = append_segment(History(), [rank_steps([2.0], 0.1)], [])
    both = append_segment(first, [rank_steps([1.0, 0.5], 0.2, 0.3)], [])
    assert both.step_s == [0.1, 0.2, 0.3]
    assert both.segment_starts == [0, 1]


def test_a_step_that_failed_after_its_loss_is_not_counted() -> None:
    assert append_segment(History(), [rank_steps([2.0, 1.0], 0.1)], []).loss == [2.0]


def test_ranks_that_disagree_on_the_number_of_steps_are_an_error() -> None:
    ranks = [rank_steps([1.0, 1.0], 0.1, 0.1), rank_steps([1.0], 0.1)]
    with pytest.raises(ClockError, match=r"disagree .* \(rank 0: 2, rank 1: 1\)"):
        append_segment(History(), ranks, [])


@pytest.mark.parametrize(
    ("loss", "step_s", "fault"),
    [
        (math.nan, 0.1, "loss is nan at step 2; lower optimizer.learning-rate"),
        (math.inf, 0.1, "loss is inf at step 2"),
        (1.0, -0.1, "step 2 has step_s -0.1: the clock went backwards"),
        (1.0, 0.0, "step 2 has step_s 0.0"),
    ],
)
def test_an_impossible_step_is_an_error_and_ends_the_samples(
    loss: float, step_s: float, fault: str
) -> None:
    history = append_segment(History(), [rank_steps([3.0, loss, 1.0], 0.1, step_s, 0.1)], [])
    assert fault in str(find_fault(history))
    assert history.loss == [3.0]
    assert (history.step_s, history.slowest_rank) == ([0.1], [0])


@pytest.mark.parametrize("name", [*CLOCK_FIELDS, "min_communication_s"])
@pytest.mark.parametrize("seconds", [-1e-9, math.nan, math.inf])
def test_no_part_of_a_step_is_negative(name: str, seconds: float) -> None:
    history = append_segment(History(), [rank_steps([3.0, 2.0], 0.1, 0.1)], [])
    getattr(history, name)[1] = seconds
    assert f"step 2 has {name} {seconds}" in str(find_fault(history))
    assert history.loss == [3.0]


def test_a_nan_validation_is_an_error_and_is_not_recorded() -> None:
    points = [{"step": 1, "val_loss": 2.0}, {"step": 2, "val_loss": math.nan}]
    history = append_segment(History(), [rank_steps([3.0, 2.0], 0.1, 0.1)], points)
    assert "validation loss is nan after step 2" in str(find_fault(history))
    assert history.validation == points[:1]
    assert history.loss == [3.0, 2.0], "the training losses are finite"


def test_valid_steps_are_accepted() -> None:
    assert find_fault(append_segment(History(), [rank_steps([3.0], 0.1)], [])) is None
