"""Tests the detection of steady state on series with a known beginning."""

import math
import random
import statistics
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unitransformer.stats.steady_state import find_steady_state

NUM_STEPS = 200
NUM_SERIES = 100
Shape = Callable[[int], float]


def make_steps(
    seed: int, shape: Shape = lambda step: 1.0, num_steps: int = NUM_STEPS
) -> list[float]:
    """`shape` times lognormal AR(1) noise of 3 % and 0.5; one step in twenty is tripled."""
    rng = random.Random(seed)
    noise, steps = rng.gauss(0, 1), []
    for step in range(num_steps):
        noise = 0.5 * noise + math.sqrt(0.75) * rng.gauss(0, 1)
        spike = 3 if rng.random() < 0.05 else 1
        steps.append(shape(step) * spike * math.exp(0.03 * noise))
    return steps


def starts(shape: Shape, num_steps: int = NUM_STEPS) -> list[int | None]:
    return [
        find_steady_state(make_steps(seed, shape, num_steps)).start for seed in range(NUM_SERIES)
    ]


def num_within(detected: Sequence[int | None], first: int, last: int) -> int:
    return sum(start is not None and first <= start <= last for start in detected)


def mser(step_s: Sequence[float], batch: int = 1) -> int:
    """White 1997; MSER-5 with a batch of 5: the cut in the first half that minimizes the standard
    error of the rest."""
    means = [
        statistics.fmean(step_s[place : place + batch])
        for place in range(0, len(step_s) - batch + 1, batch)
    ]
    return batch * min(
        range(len(means) // 2 + 1),
        key=lambda cut: statistics.pvariance(means[cut:]) / len(means[cut:]),
    )


# ------------------------------------------------------------------------------ what is steady


@pytest.mark.parametrize("num_steps", [20, 50, 100, 200, 400])
def test_steady_state_keeps_all_but_two_steps_in_nine_of_ten_stationary_series(
    num_steps: int,
) -> None:
    assert num_within(starts(lambda step: 1.0, num_steps), 0, 2) >= 90


def test_a_stall_every_ten_steps_belongs_to_the_steady_state() -> None:
    assert num_within(starts(lambda step: 4.0 if step % 10 == 0 else 1.0), 0, 3) >= 90
    assert num_within(starts(lambda step: 4.0 if step % 10 == 9 else 1.0), 0, 3) >= 90


@given(every=st.integers(2, 20), stall=st.floats(1.5, 50), phase=st.integers(0, 19))
@settings(max_examples=50, deadline=None)
def test_stalls_at_any_interval_belong_to_the_steady_state(
    every: int, stall: float, phase: int
) -> None:
    steps = [stall if step % every == phase % every else 1.0 for step in range(NUM_STEPS)]
    start = find_steady_state(steps).start
    assert start is not None
    assert start <= 2


def test_steps_that_all_take_the_same_time_are_steady() -> None:
    assert find_steady_state([0.1] * 8).start == 0


# ------------------------------------------------------------------------------ what is not


def test_warm_up_ends_exactly_after_the_compiled_steps() -> None:
    assert num_within(starts(lambda step: 50.0 if step < 3 else 1.0), 3, 5) >= 90


def test_a_fast_step_between_two_that_compile_does_not_end_the_warm_up() -> None:
    assert num_within(starts(lambda step: 50.0 if step in (0, 2) else 1.0), 3, 5) >= 90


@given(slow=st.integers(0, 20), times=st.floats(1.5, 1000))
@settings(max_examples=50, deadline=None)
def test_warm_up_contains_the_slow_first_steps_and_at_most_three_others(
    slow: int, times: float
) -> None:
    start = find_steady_state([times] * slow + [1.0] * 60).start
    assert start is not None
    assert slow <= start <= max(slow, 4)  # a level has four steps at least


def test_warm_up_lasts_until_the_allocator_stops_growing() -> None:
    assert num_within(starts(lambda step: 1.1 if step < 20 else 1.0), 18, 25) >= 80
    assert num_within(starts(lambda step: 1.1 if step < 20 else 1.0), 18, 150) >= 98


def test_a_ramp_is_warm_up_until_less_than_the_noise_remains() -> None:
    # 20 % slower at first, 7 % at step 21, which is two standard deviations.
    assert num_within(starts(lambda step: 1 + 0.2 * math.exp(-step / 20)), 21, 100) >= 90


def test_steady_state_begins_after_a_shift_in_the_middle() -> None:
    assert num_within(starts(lambda step: 1.0 if step < 100 else 1.1), 95, 110) >= 85
    assert num_within(starts(lambda step: 1.0 if step < 100 else 1.1), 0, 94) <= 5


def test_a_shift_near_the_end_leaves_no_steady_state() -> None:
    detected = [
        find_steady_state(make_steps(s, lambda step: 1.0 if step < 180 else 1.2)) for s in range(50)
    ]
    assert sum(steady.start is None for steady in detected) >= 45
    reason = next(steady.reason for steady in detected if steady.reason)
    assert reason.endswith("steps before the end of 200, needs 50 steps of one level")


def test_a_ramp_over_the_whole_run_is_rarely_taken_for_steady() -> None:
    detected = starts(lambda step: 2.0 - step / NUM_STEPS)
    assert sum(start is None for start in detected) >= 90


def test_a_disturbance_that_ends_is_part_of_the_warm_up() -> None:
    detected = starts(lambda step: 2.0 if 60 <= step < 120 else 1.0)
    assert num_within(detected, 118, 130) >= 85


def test_too_few_steps_and_unsteady_steps_have_different_reasons() -> None:
    steady = find_steady_state([0.1] * 7)
    assert (steady.start, steady.reason) == (None, "7 steps, needs 8")
    assert steady.select([0.1] * 7) == []


# ------------------------------------------------------------------------------ known beforehand


def test_known_unsteady_steps_are_excluded_and_named() -> None:
    steps = [1.0] * 30
    steps[0] = steps[12] = steps[20] = 9.0
    steady = find_steady_state(steps, excluded_steps={20, 0, 12})
    assert (steady.start, steady.left_out) == (1, (12, 20))
    assert steady.select(steps) == [1.0] * 27


def test_excluded_steps_do_not_count_towards_the_minimum() -> None:
    assert find_steady_state([1.0] * 10, excluded_steps={0, 1, 2}).reason == "7 steps, needs 8"


def test_invalid_times_and_step_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step_s\[1\] is -1\.0; a step takes"):
        find_steady_state([1.0, -1.0])
    with pytest.raises(ValueError, match=r"step_s\[0\] is nan"):
        find_steady_state([math.nan])
    with pytest.raises(ValueError, match="excluded_steps names step 9; there are 9"):
        find_steady_state([1.0] * 9, excluded_steps=[9])


# ------------------------------------------------------------------------------ other methods


def test_steady_state_detection_errs_less_than_mser_and_mser_5() -> None:
    """A cut is right from the true one to ten steps after it."""
    shapes: dict[int, Shape] = {
        0: lambda step: 1.0,
        3: lambda step: 50.0 if step < 3 else 1.0,
        20: lambda step: 1.1 if step < 20 else 1.0,
        100: lambda step: 1.0 if step < 100 else 1.1,
    }
    right = {"ours": 0, "mser": 0, "mser-5": 0}
    for true, shape in shapes.items():
        for seed in range(50):
            steps = make_steps(seed, shape)
            detected = {
                "ours": find_steady_state(steps).start,
                "mser": mser(steps),
                "mser-5": mser(steps, 5),
            }
            for name, start in detected.items():
                right[name] += start is not None and true <= start + 1 and start <= true + 10
    assert right["ours"] >= 165  # of 200
    assert right["ours"] > right["mser-5"] + 20
    assert right["ours"] > right["mser"] + 20
