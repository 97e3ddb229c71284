"""Tests the printed plan before the first step and the estimate of the time left."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from tests.builders.records import make_config
from unitransformer.config import RunConfig
from unitransformer.costs.flops import flops_per_sample
from unitransformer.training.progress import TimeLeft

# 20 steps of 16 tokens; validation after steps 8, 16 and 20.
CONFIG = replace(
    make_config(num_steps=20), log_every=5, validate_every=8, validation_batches=12, batch_size=2
)


def lines_of(
    config: RunConfig,
    step_s: Sequence[float],
    *,
    matmul_flops_per_s: float | None = None,
    first_step: int = 0,
) -> list[str]:
    """Returns the lines printed while the steps take `step_s`."""
    done: list[float] = []
    clock: Any = SimpleNamespace(step_s=lambda: list(done))
    trainer: Any = SimpleNamespace(global_step=first_step)
    printed: list[str] = []
    time_left = TimeLeft(config, clock, printed.append, lambda: matmul_flops_per_s)
    time_left.on_train_start(trainer)
    for seconds in step_s:
        done.append(seconds)
        trainer.global_step += 1
        time_left.on_train_batch_end(trainer)
    return printed


def test_plan_counts_steps_tokens_and_validations() -> None:
    assert lines_of(CONFIG, []) == ["plan    20 steps of 16 tokens, 3 validations"]
    assert lines_of(CONFIG, [], first_step=8) == ["plan    12 steps of 16 tokens, 2 validations"]
    (line,) = lines_of(replace(CONFIG, until_interval=0.01), [100.0] * 20)
    assert line == "plan    up to 20 steps of 16 tokens"  # it may stop at any of them


def test_plan_gives_the_least_time_where_matrix_products_were_measured() -> None:
    step_flops = 2 * flops_per_sample(CONFIG, causal=True)
    (line,) = lines_of(CONFIG, [], matmul_flops_per_s=step_flops / 3)  # 20 steps of 3 s
    assert line.endswith("3 validations; at least 60 s at the matrix product speed just measured")
    (line,) = lines_of(CONFIG, [], matmul_flops_per_s=step_flops * 100)
    assert line.endswith("3 validations")


def test_time_left_is_estimated_once_and_not_by_the_first_step() -> None:
    _, line = lines_of(CONFIG, [90.0, *[3.0] * 19])
    # After step 5: 15 steps of 3 s, 3 validations of 12 batches of 1 s.
    assert line == "time    about 81 s of training left: 15 steps of 3 s, 3 validations"


def test_a_validation_that_follows_the_estimate_at_once_counts() -> None:
    config = replace(CONFIG, validate_every=5)
    _, line = lines_of(config, [1.5] * 5)
    # After steps 5, 10, 15 and 20: 15 steps of 1.5 s, 48 batches of 0.5 s.
    assert line == "time    about 46 s of training left: 15 steps of 1.5 s, 4 validations"


def test_micro_batches_count_once() -> None:
    _, line = lines_of(replace(CONFIG, accumulate=4), [3.0] * 5)
    # A validation batch is one micro-batch: a quarter of a step, a third of that.
    assert line == "time    about 54 s of training left: 15 steps of 3 s, 3 validations"


def test_a_few_seconds_are_not_worth_a_line() -> None:
    assert len(lines_of(CONFIG, [0.1] * 20)) == 1
