"""Formats the log lines of a run from its samples, while it trains and again in a report."""

import statistics
from collections.abc import Mapping, Sequence

from unitransformer.config import RunConfig
from unitransformer.record.units import METRIC, format_metric, metric_value


def is_due(config: RunConfig, step: int) -> bool:
    """Returns whether a line is logged after `step` steps."""
    return step in (1, config.max_steps) or step % config.log_every == 0


def step_line(config: RunConfig, step: int, *, loss: float, recent_s: Sequence[float]) -> str:
    """Formats the line of an optimizer step.

    It has no rate, since the first steps of a run are not a steady state.

    Args:
        recent_s: seconds of the steps since the previous line, of which it gives the median.
    """
    return (
        f"{_format_step(config, step)}"
        f" | loss {loss:8.4f}"
        f" | lr {config.optimizer.learning_rate_at(step - 1):.2e}"
        f" | {ms_per_step(recent_s)}"
    )


def ms_per_step(recent_s: Sequence[float]) -> str:
    return f"{statistics.median(recent_s) * 1000:8.1f} ms/step"


def validation_line(config: RunConfig, point: Mapping[str, float]) -> str:
    """Formats the loss and the task's metric of one validation."""
    metric = METRIC[config.recipe]
    value = metric_value(config.recipe, loss=point["val_loss"], accuracy=point["val_accuracy"])
    return (
        f"{_format_step(config, int(point['step']))}"
        f" | validation loss {point['val_loss']:.4f} | {metric} {format_metric(metric, value)}"
    )


def log_lines(
    config: RunConfig,
    *,
    loss: Sequence[float],
    step_s: Sequence[float],
    segment_starts: Sequence[int],
    validation: Sequence[Mapping[str, float]],
) -> list[str]:
    """Returns the lines of a whole run, over all ranks.

    Args:
        loss: of every step, the mean over the ranks.
        step_s: seconds of every step, of the slowest rank.
        segment_starts: first step of each segment; no line spans two segments.
        validation: one point for each validation.
    """
    points = {int(point["step"]): point for point in validation}
    segment_ends, last = {*segment_starts, len(loss)}, 0
    lines = []
    for step in range(1, len(loss) + 1):
        if is_due(config, step) or step in segment_ends:
            lines.append(step_line(config, step, loss=loss[step - 1], recent_s=step_s[last:step]))
            last = step
        if step in points:
            lines.append(validation_line(config, points[step]))
    return lines


def _format_step(config: RunConfig, step: int) -> str:
    return f"step {step:>{len(str(config.max_steps))}}/{config.max_steps}"
