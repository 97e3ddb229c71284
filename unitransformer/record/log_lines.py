"""The lines a run says: out of its samples, the same while it trains and in a report."""

import statistics
from collections.abc import Mapping, Sequence

from unitransformer.config import RunConfig
from unitransformer.record.units import METRIC, metric_in_words, metric_value


def is_due(config: RunConfig, step: int) -> bool:
    """Whether a line is said after `step` steps."""
    return step in (1, config.max_steps) or step % config.log_every == 0


def step_line(config: RunConfig, step: int, *, loss: float, recent_s: Sequence[float]) -> str:
    """Of an optimizer step.

    Args:
        recent_s: seconds of the steps since the line before; their median is told, and no rate:
            the first of them are no steady state.
    """
    return (
        f"{_place(config, step)}"
        f" | loss {loss:8.4f}"
        f" | lr {config.optimizer.learning_rate_at(step - 1):.2e}"
        f" | {ms_per_step(recent_s)}"
    )


def ms_per_step(recent_s: Sequence[float]) -> str:
    return f"{statistics.median(recent_s) * 1000:8.1f} ms/step"


def validation_line(config: RunConfig, point: Mapping[str, float]) -> str:
    """Loss and the task's metric of one validation."""
    metric = METRIC[config.recipe]
    value = metric_value(config.recipe, loss=point["val_loss"], accuracy=point["val_accuracy"])
    return (
        f"{_place(config, int(point['step']))}"
        f" | validation loss {point['val_loss']:.4f} | {metric} {metric_in_words(metric, value)}"
    )


def log_lines(
    config: RunConfig,
    *,
    loss: Sequence[float],
    step_s: Sequence[float],
    segment_starts: Sequence[int],
    validation: Sequence[Mapping[str, float]],
) -> list[str]:
    """All lines of a run, of all ranks together.

    Args:
        loss: mean over the ranks, of every step.
        step_s: seconds of the slowest rank, of every step.
        launches: first step of each launch, with which the lines begin anew.
        validation: one point each.
    """
    points = {int(point["step"]): point for point in validation}
    ends, last = {*segment_starts, len(loss)}, 0
    lines = []
    for step in range(1, len(loss) + 1):
        if is_due(config, step) or step in ends:
            lines.append(step_line(config, step, loss=loss[step - 1], recent_s=step_s[last:step]))
            last = step
        if step in points:
            lines.append(validation_line(config, points[step]))
    return lines


def _place(config: RunConfig, step: int) -> str:
    return f"step {step:>{len(str(config.max_steps))}}/{config.max_steps}"
