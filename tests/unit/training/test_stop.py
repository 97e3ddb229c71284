"""Tests when a run may stop because its median step is known."""

import math
import random
from types import SimpleNamespace

import pytest

from unitransformer.stats.intervals import describe
from unitransformer.training import stop
from unitransformer.training.stop import is_check_step, is_narrow


def make_steps(seed: int, num_steps: int = 1200) -> list[float]:
    """Lognormal AR(1) of 0.5 around 1 s: its true median."""
    rng = random.Random(seed)
    noise, steps = rng.gauss(0, 1), []
    for _ in range(num_steps):
        noise = 0.5 * noise + math.sqrt(0.75) * rng.gauss(0, 1)
        steps.append(math.exp(0.1 * noise))
    return steps


CHECKS = [count for count in range(1201) if is_check_step(count)]


def test_checks_are_spaced_a_quarter_further_apart_each_time() -> None:
    assert CHECKS[:5] == [64, 80, 100, 125, 156]
    assert sum(is_check_step(count) for count in range(10_001)) == 23  # 64 * 1.25**22 = 8,674


def test_the_median_of_equal_steps_is_known_and_of_scattered_steps_is_not() -> None:
    assert is_narrow([0.1] * 64, 0.01)
    assert not is_narrow(make_steps(0, 64), 0.01)


def test_the_median_of_too_few_or_unsteady_steps_is_never_known() -> None:
    assert not is_narrow([0.1] * 49, 0.5)
    assert not is_narrow([1.0] * 95 + [2.0] * 5, 0.5)


def test_known_unsteady_steps_do_not_count() -> None:
    steps = [0.1] * 70
    assert is_narrow(steps, 0.01, excluded_steps=range(20))
    assert not is_narrow(steps, 0.01, excluded_steps=range(21))


def test_the_interval_after_stopping_early_covers_the_median_9_times_in_10() -> None:
    """Stopping selects the luckiest of several checks; the stricter confidence makes up for it."""
    covered, ended = 0, 0
    for seed in range(100):
        steps = make_steps(seed)
        end = next((count for count in CHECKS if is_narrow(steps[:count], 0.06)), None)
        if end is None:
            continue
        interval = describe(steps[:end])
        assert interval.low is not None
        assert interval.high is not None
        ended += 1
        covered += interval.low <= 1 <= interval.high
    assert ended >= 95
    assert covered / ended >= 0.9


def test_an_invalid_target_width_is_refused() -> None:
    with pytest.raises(ValueError, match="target is 1; give a share"):
        is_narrow([0.1] * 64, 1)


def test_a_wide_interval_does_not_undo_the_stop_that_a_signal_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(step_s=lambda: [1.0, 2.0] * 32)
    callback = stop.UntilInterval(0.001, clock, dict)  # type: ignore[arg-type]
    monkeypatch.setattr(stop, "gather", lambda value, module: [value])
    trainer = SimpleNamespace(global_step=64, should_stop=True)
    callback.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    assert trainer.should_stop
