"""The clock, where steady begins, and rates."""

import random
import time

import pytest

from unitransformer.measure import StepClock
from unitransformer.steady import rate_per_s, slowest, steady_start


def test_the_clock_reads_the_span_between_start_and_stop() -> None:
    clock = StepClock()
    clock.start()
    time.sleep(0.05)
    clock.stop()
    time.sleep(0.05)
    clock.start()
    clock.stop()
    first, second = clock.step_s()
    assert 0.05 <= first
    assert second < 0.05


def test_a_step_under_way_goes_on_unless_it_begins_again() -> None:
    clock = StepClock()
    clock.start()
    time.sleep(0.02)
    clock.start()
    clock.stop()
    clock.start()
    time.sleep(0.02)
    clock.start(again=True)
    clock.stop()
    under_way, again = clock.step_s()
    assert under_way >= 0.02 > again


def test_slow_first_steps_are_not_steady() -> None:
    noise = random.Random(0)
    steps = [5.0, 3.0, 2.0] + [1.0 + 0.01 * noise.random() for _ in range(40)]
    assert steady_start(steps) == 3


def test_a_run_steady_from_the_start_keeps_nearly_all_its_steps() -> None:
    noise = random.Random(1)
    start = steady_start([1.0 + 0.01 * noise.random() for _ in range(40)])
    assert start is not None
    assert start <= 20


def test_too_few_steps_have_no_steady_state_and_no_rate() -> None:
    assert steady_start([1.0] * 7) is None
    assert rate_per_s([1.0] * 7, None, 100) is None


def test_the_rate_is_that_of_the_median_steady_step() -> None:
    assert rate_per_s([9.0, 0.5, 0.25, 0.5], 1, 100) == 200


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    assert slowest([[1.0, 5.0], [2.0, 4.0]]) == [2.0, 5.0]


def test_ranks_that_disagree_on_the_number_of_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        slowest([[1.0, 5.0], [2.0]])
