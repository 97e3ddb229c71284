"""What all ranks saw, put together; and steps that cannot have been."""

import math
from dataclasses import replace

import pytest

from unitransformer.measure.clock import Step
from unitransformer.training.history import (
    CLOCKED,
    ClockError,
    History,
    Share,
    extend,
    find_fault,
    read_history,
)


def steps(*step_s: float) -> list[Step]:
    return [
        Step(step_s=s, cpu_s=2 * s, data_s=0.0, forward_backward_s=s, optimizer_s=0.0)
        for s in step_s
    ]


def share(loss: list[float], *step_s: float) -> Share:
    return Share(loss=loss, steps=steps(*step_s), gradient_norm=[])


def test_the_loss_is_the_mean_of_the_ranks_and_the_time_that_of_the_slowest() -> None:
    ranks = [share([1.0, 2.0], 0.1, 0.5), share([3.0, 4.0], 0.2, 0.4)]
    history = extend(History(), ranks, [])
    assert history.loss == [2.0, 3.0]
    assert history.step_s == [0.2, 0.5]
    assert history.slowest_rank == [1, 0]
    assert history.cpu_s == [0.4, 1.0], "of the rank that was slowest"


def test_communication_of_the_rank_that_waited_least_stands_beside_that_of_the_slowest() -> None:
    def told(step_s: float, communication_s: float | None) -> Share:
        step = replace(steps(step_s)[0], communication_s=communication_s)
        return Share(loss=[1.0], steps=[step], gradient_norm=[])

    history = extend(History(), [told(0.5, 0.2), told(0.4, 0.1)], [])
    assert (history.communication_s, history.least_communication_s) == ([0.2], [0.1])
    untold = extend(History(), [told(0.5, None), told(0.4, 0.1)], [])
    assert (untold.communication_s, untold.least_communication_s) == ([None], [None])


def test_a_checkpoint_of_before_goes_on_with_what_it_does_not_tell() -> None:
    told = {"loss": [1.0, 1.0], "step_s": [0.1, 0.1], "num_updates": 2}
    history = read_history(told)
    assert history.between_s == history.communication_s == [None, None]
    assert read_history({}) == History()


def test_a_second_launch_goes_on_after_the_first() -> None:
    first = extend(History(), [share([2.0], 0.1)], [])
    both = extend(first, [share([1.0, 0.5], 0.2, 0.3)], [])
    assert both.step_s == [0.1, 0.2, 0.3]
    assert both.launches == [0, 1]


def test_a_step_that_broke_after_its_loss_is_not_one() -> None:
    assert extend(History(), [share([2.0, 1.0], 0.1)], []).loss == [2.0]


def test_ranks_that_disagree_on_the_number_of_steps_are_an_error() -> None:
    ranks = [share([1.0, 1.0], 0.1, 0.1), share([1.0], 0.1)]
    with pytest.raises(ClockError, match=r"disagree .* \(rank 0: 2, rank 1: 1\)"):
        extend(History(), ranks, [])


@pytest.mark.parametrize(
    ("loss", "step_s", "fault"),
    [
        (math.nan, 0.1, "loss is nan at step 2; lower optimizer.learning_rate"),
        (math.inf, 0.1, "loss is inf at step 2"),
        (1.0, -0.1, "step 2 has step_s -0.1: the clock went backwards"),
        (1.0, 0.0, "step 2 has step_s 0.0"),
    ],
)
def test_a_step_that_cannot_be_is_an_error_and_ends_the_samples(
    loss: float, step_s: float, fault: str
) -> None:
    history = extend(History(), [share([3.0, loss, 1.0], 0.1, step_s, 0.1)], [])
    assert fault in str(find_fault(history))
    assert history.loss == [3.0]
    assert (history.step_s, history.slowest_rank) == ([0.1], [0])


@pytest.mark.parametrize("name", [*CLOCKED, "least_communication_s"])
@pytest.mark.parametrize("seconds", [-1e-9, math.nan, math.inf])
def test_no_part_of_a_step_is_negative(name: str, seconds: float) -> None:
    history = extend(History(), [share([3.0, 2.0], 0.1, 0.1)], [])
    getattr(history, name)[1] = seconds
    assert f"step 2 has {name} {seconds}" in str(find_fault(history))
    assert history.loss == [3.0]


def test_a_validation_that_is_no_number_is_an_error_and_is_no_point() -> None:
    points = [{"step": 1, "val_loss": 2.0}, {"step": 2, "val_loss": math.nan}]
    history = extend(History(), [share([3.0, 2.0], 0.1, 0.1)], points)
    assert "validation loss is nan after step 2" in str(find_fault(history))
    assert history.validation == points[:1]
    assert history.loss == [3.0, 2.0], "they were sound"


def test_sound_steps_are_no_error() -> None:
    assert find_fault(extend(History(), [share([3.0], 0.1)], [])) is None
