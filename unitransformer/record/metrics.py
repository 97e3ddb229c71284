"""Computes the metrics of a run from its raw samples: step time, rate, shares of the step, MFU.

The record holds the metrics of the steady steps of the last segment, `StepMetrics.as_dict`. Rates
count tokens or images ("units") of all ranks together.
"""

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_flops
from unitransformer.costs.mfu import Ceiling, MfuRow, build_mfu_report
from unitransformer.record.units import format_si, format_si_interval
from unitransformer.stats.comparisons import LaunchVariance
from unitransformer.stats.intervals import MedianInterval, describe, mean_rate
from unitransformer.stats.steady_state import SteadyState, find_steady_state

PARTS = ("data_s", "forward_backward_s", "optimizer_s")
COMMUNICATION = ("communication_s", "min_communication_s")
PART_LABELS = {
    "data_s": "waiting for data",
    "forward_backward_s": "forward and backward",
    "optimizer_s": "optimizer",
    "communication_s": "exposed communication",
}
NO_INTERVAL = "no interval: "
PLAIN_METRICS = (
    "interval",
    "median_cpu_s",
    "units_per_s",
    "low_units_per_s",
    "high_units_per_s",
    "mean_units_per_s",
)


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of the steady steps; a share is None if it was not measured in all of them."""

    step: MedianInterval  # seconds of a steady step
    interval: str  # how the interval of `step` was computed, or why there is none
    median_cpu_s: float  # processor time of a steady step
    units_per_s: float  # at the median step
    low_units_per_s: float | None  # None: too few steps for an interval, see `step.reason`
    high_units_per_s: float | None
    mean_units_per_s: float  # from totals, with stalls and the time between the steps
    shares: Mapping[str, float]  # of the time of the steady steps, by part of the step
    waiting_share: float | None  # the part of communication that waits for the slowest rank
    between_steps_share: float | None  # of the time from step to step

    def as_dict(self) -> dict[str, Any]:
        """Returns the metrics as a record holds them; shares that are None are absent."""
        optional = {
            "waiting_share": self.waiting_share,
            "between_steps_share": self.between_steps_share,
        }
        return {
            "num_steady_steps": self.step.count,
            "median_step_s": self.step.median,
            "mad_step_s": self.step.mad,
            "low_step_s": self.step.low,
            "high_step_s": self.step.high,
            **{name: getattr(self, name) for name in PLAIN_METRICS},
            **{_share_name(part): share for part, share in self.shares.items()},
            **{name: share for name, share in optional.items() if share is not None},
        }


def read_metrics(metrics: Mapping[str, Any]) -> StepMetrics | None:
    """Returns the metrics of a record; None if it has none, for lack of a steady state.

    The block length of the interval is None: a record does not hold it.
    """
    if not metrics:
        return None
    reason = None
    if metrics["low_step_s"] is None:
        reason = metrics["interval"].removeprefix(NO_INTERVAL)
    step = MedianInterval(
        median=metrics["median_step_s"],
        mad=metrics["mad_step_s"],
        count=metrics["num_steady_steps"],
        low=metrics["low_step_s"],
        high=metrics["high_step_s"],
        block_length=None,
        reason=reason,
    )
    shares = {part: metrics.get(_share_name(part)) for part in PART_LABELS}
    return StepMetrics(
        step=step,
        shares={part: share for part, share in shares.items() if share is not None},
        waiting_share=metrics.get("waiting_share"),
        between_steps_share=metrics.get("between_steps_share"),
        **{name: metrics[name] for name in PLAIN_METRICS},
    )


def _share_name(part: str) -> str:
    return f"{part.removesuffix('_s')}_share"


def format_flops_rate(flops_per_s: float, metrics: Mapping[str, Any]) -> str:
    """Formats a rate that is proportional to the rate in `metrics`, with its interval."""
    ends = _interval(flops_per_s, metrics)
    if ends is None:
        return f"{format_si(flops_per_s)}FLOP/s"
    return format_si_interval(flops_per_s, *ends, unit="FLOP/s")


def format_share(share: float, metrics: Mapping[str, Any]) -> str:
    """Formats a share of an exact peak or ceiling, with the interval of the rate in `metrics`."""
    ends = _interval(share, metrics)
    return f"{share:.1%}" if ends is None else f"{share:.1%} ({ends[0]:.1%} to {ends[1]:.1%})"


def _interval(value: float, metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    """Returns the interval of a value proportional to the rate; None if the rate has none."""
    low, middle, high = (metrics.get(f"{end}units_per_s") for end in ("low_", "", "high_"))
    if low is None or middle is None or high is None:
        return None
    return value * low / middle, value * high / middle


def format_time_shares(metrics: Mapping[str, Any]) -> str:
    """Formats where the time of a steady step goes."""
    shares = {label: metrics.get(_share_name(part)) for part, label in PART_LABELS.items()}
    parts = [f"{label} {share:.1%}" for label, share in shares.items() if share is not None]
    if waiting_share := metrics.get("waiting_share"):
        parts.append(f"{waiting_share:.1%} of the step waiting for the slowest rank")
    return ", ".join(parts)


def _describe_interval(step: MedianInterval) -> str:
    if step.reason is not None:
        return f"{NO_INTERVAL}{step.reason}"
    return (
        f"{step.confidence:.0%} interval of the median: block bootstrap of {step.count} "
        f"samples in blocks of {step.block_length}"
    )


def find_last_steady_state(
    step_s: Sequence[float], *, segment_starts: Sequence[int], excluded_steps: Collection[int]
) -> SteadyState:
    """Finds the steady state of the last segment; it counts steps from the start of that segment.

    Args:
        step_s: seconds of every optimizer step of the run.
        segment_starts: first step of each segment of the run.
        excluded_steps: steps of the run that are known not to be steady.
    """
    first = segment_starts[-1]
    excluded = [step - first for step in excluded_steps if first <= step < len(step_s)]
    return find_steady_state(step_s[first:], excluded)


def recorded_steady_state(record: Mapping[str, Any]) -> SteadyState:
    """Returns the recorded steady state; it counts steps from the start of the last segment."""
    if record["steady_from"] is None:
        return SteadyState(start=None, reason=record["no_steady_state_reason"])
    first = record["segment_starts"][-1]
    start = record["steady_from"] - first
    excluded = (item["step"] - first for item in record["excluded_steps"])
    return SteadyState(start=start, left_out=tuple(step for step in excluded if step > start))


def compute_metrics(
    step_s: Sequence[float],
    samples: Mapping[str, Sequence[float | None]],
    steady: SteadyState,
    *,
    segment_starts: Sequence[int],
    units_per_step: float,
) -> StepMetrics | None:
    """Returns the metrics of the steady steps; None if there are none.

    Args:
        step_s: seconds of every optimizer step of the run.
        samples: the other samples of the same steps, by name; the optional ones may be absent.
        units_per_step: tokens or images of an optimizer step over all ranks.
    """
    first = segment_starts[-1]
    steps = [first + step for step in steady.steps(len(step_s) - first)]
    if not steps:
        return None
    steady_s = [step_s[step] for step in steps]
    total_s = math.fsum(steady_s)
    parts_s = {name: _select(samples.get(name), steps) for name in (*PARTS, *COMMUNICATION)}
    shares = {name: math.fsum(s) / total_s for name, s in parts_s.items() if s is not None}
    waiting_share = None
    if shares.keys() >= {*COMMUNICATION}:
        waiting_share = shares["communication_s"] - shares["min_communication_s"]
    # Gaps next to a step that is not steady are excluded: that step caused them.
    successors = [step for before, step in itertools.pairwise(steps) if step == before + 1]
    gaps_s = _select(samples.get("between_steps_s"), successors)
    between_s = math.fsum(gaps_s or [])
    step = describe(steady_s)
    return StepMetrics(
        step=step,
        interval=_describe_interval(step),
        median_cpu_s=statistics.median(_select(samples["cpu_s"], steps) or ()),
        units_per_s=units_per_step / step.median,
        low_units_per_s=None if step.high is None else units_per_step / step.high,
        high_units_per_s=None if step.low is None else units_per_step / step.low,
        mean_units_per_s=mean_rate(steady_s, units_per_step, between_steps_s=between_s),
        shares={part: shares[part] for part in PART_LABELS if part in shares},
        waiting_share=waiting_share,
        between_steps_share=None if gaps_s is None else between_s / (total_s + between_s),
    )


def _select(samples: Sequence[float | None] | None, steps: Sequence[int]) -> list[float] | None:
    """Returns the samples of `steps`; None if one of them was not measured."""
    if samples is None:
        return None
    selected = [sample for step in steps if (sample := samples[step]) is not None]
    return selected if len(selected) == len(steps) else None


def format_launch_variance(variance: LaunchVariance) -> str:
    """Formats the median step of repeated launches and the variance within and between them."""
    medians = ", ".join(f"{median * 1000:.2f}" for median in variance.medians)
    text = f"median steps {medians} ms"
    if variance.median is None or variance.within is None or variance.between is None:
        return f"{text}; not split: {variance.reason}"
    assert variance.low is not None
    assert variance.high is not None
    return (
        f"{text}; all together {variance.median * 1000:.2f} ms "
        f"({variance.low * 1000:.2f} to {variance.high * 1000:.2f}); a launch's median varies by "
        f"{variance.within:.2%} because its steps differ, and by {variance.between:.2%} from "
        "launch to launch beyond that"
    )


def compute_mfu(
    config: RunConfig,
    units_per_s: float | None,
    hardware: Sequence[Mapping[str, Any]],
    ceilings: Sequence[Mapping[str, Any] | None],
) -> tuple[MfuRow, ...]:
    """Returns the MFU report of a run, one row per FLOP convention.

    Args:
        units_per_s: of all ranks together; None without a steady state.
        hardware: of every rank, as in a record.
        ceilings: what every rank measured in this job, or None. The highest counts.
    """
    measured = [
        Ceiling(flops_per_s=ceiling["matmul_flops_per_s"], dtype=ceiling["dtype"])
        for ceiling in ceilings
        if ceiling is not None
    ]
    matmul = hardware[0].get("float32_matmul_precision")
    devices = dict.fromkeys(str(host["device"]) for host in hardware)
    return build_mfu_report(
        count_flops(config),
        units_per_s=units_per_s,
        num_devices=config.parallel.world_size,
        device_name=" and ".join(devices),  # different devices have no common peak
        precision=config.parallel.precision,
        allows_tf32=None if matmul is None else matmul != "highest",
        ceiling=max(measured, key=lambda ceiling: ceiling.flops_per_s, default=None),
    )
