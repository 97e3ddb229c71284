"""Raw samples of a run in; the figures people read out, the same for the record and the report."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_flops
from unitransformer.costs.mfu import Ceiling, MfuRow, build_mfu_report
from unitransformer.record.units import si, si_interval
from unitransformer.stats.comparisons import LaunchVariance
from unitransformer.stats.intervals import MedianInterval, describe, mean_rate
from unitransformer.stats.steady_state import SteadyState, find_steady_state

PARTS = ("data_s", "forward_backward_s", "optimizer_s")
COMMUNICATION = ("communication_s", "min_communication_s")
ALL_PARTS = (*PARTS, COMMUNICATION[0])
NO_INTERVAL = "no interval: "
PLAIN_FIGURES = (
    *("interval", "median_cpu_s", "units_per_s", "low_units_per_s", "high_units_per_s"),
    "mean_units_per_s",
)
WORDS = {
    "data": "waiting for data",
    "forward_backward": "forward and backward",
    "optimizer": "optimizer",
    "communication": "exposed communication",
}


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What the steady steps of the last launch say.

    Rates are tokens or pictures a second, of all ranks together.
    """

    step: MedianInterval  # seconds of a steady step
    interval: str  # how the interval of `step` was found, or why there is none
    median_cpu_s: float  # processor time of a steady step
    units_per_s: float  # at the median step
    low_units_per_s: float | None  # None: too few steps for an interval, `step.reason` says so
    high_units_per_s: float | None
    mean_units_per_s: float  # from totals: stalls are in it, and what lies between the steps
    shares: Mapping[str, float]  # of the time of the steady steps, by part; communication if told
    waiting_share: float | None  # of communication: waiting for the slowest rank; None: not told
    between_steps_share: float | None  # of the time from step to step: between them; None: not told

    def as_dict(self) -> dict[str, Any]:
        """Plain figures, by names with units, as they stand in the record."""
        return {
            "num_steady_steps": self.step.count,
            "median_step_s": self.step.median,
            "mad_step_s": self.step.mad,
            "low_step_s": self.step.low,
            "high_step_s": self.step.high,
            "interval": self.interval,
            "median_cpu_s": self.median_cpu_s,
            "units_per_s": self.units_per_s,
            "low_units_per_s": self.low_units_per_s,
            "high_units_per_s": self.high_units_per_s,
            "mean_units_per_s": self.mean_units_per_s,
            **{f"{part.removesuffix('_s')}_share": share for part, share in self.shares.items()},
            # Absent where they are not told: so they are in older records.
            **_told(
                {
                    "waiting_share": self.waiting_share,
                    "between_steps_share": self.between_steps_share,
                }
            ),
        }


def from_figures(figures: Mapping[str, Any]) -> StepMetrics | None:
    """The readout whose `as_dict` a record holds; None where it holds none, without a steady state.

    The block length of the interval is not among the figures, so it is None.
    """
    if not figures:
        return None
    reason = None
    if figures["low_step_s"] is None:
        reason = figures["interval"].removeprefix(NO_INTERVAL)
    step = MedianInterval(
        median=figures["median_step_s"],
        mad=figures["mad_step_s"],
        count=figures["num_steady_steps"],
        low=figures["low_step_s"],
        high=figures["high_step_s"],
        block_length=None,
        reason=reason,
    )
    shares = {part: figures.get(f"{part.removesuffix('_s')}_share") for part in ALL_PARTS}
    return StepMetrics(
        step=step,
        shares=_told(shares),
        waiting_share=figures.get("waiting_share"),
        between_steps_share=figures.get("between_steps_share"),
        **{name: figures[name] for name in PLAIN_FIGURES},
    )


def _told(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: figure for name, figure in figures.items() if figure is not None}


def flops_rate_in_words(flops_per_s: float, figures: Mapping[str, Any]) -> str:
    """With the interval of the rate it was counted from, whose figures `StepMetrics.as_dict` has."""
    ends = _ends(flops_per_s, figures)
    if ends is None:
        return f"{si(flops_per_s)}FLOP/s"
    return si_interval(flops_per_s, *ends, unit="FLOP/s")


def share_in_words(share: float, figures: Mapping[str, Any]) -> str:
    """Of a peak or a ceiling, which is held to be exact; the interval is that of the rate."""
    ends = _ends(share, figures)
    return f"{share:.1%}" if ends is None else f"{share:.1%} ({ends[0]:.1%} to {ends[1]:.1%})"


def _ends(figure: float, figures: Mapping[str, Any]) -> tuple[float, float] | None:
    """Interval of a figure in proportion to the rate; None where the rate has none."""
    low, middle, high = (figures.get(f"{end}units_per_s") for end in ("low_", "", "high_"))
    if low is None or middle is None or high is None:
        return None
    return figure * low / middle, figure * high / middle


def parts_in_words(figures: Mapping[str, Any]) -> str:
    """Where the time of a steady step goes, by figures as `StepMetrics.as_dict` has them."""
    shares = {words: figures.get(f"{part}_share") for part, words in WORDS.items()}
    told = ", ".join(f"{words} {share:.1%}" for words, share in shares.items() if share is not None)
    if not figures.get("waiting_share"):
        return told
    return f"{told}, {figures['waiting_share']:.1%} of the step waiting for the slowest rank"


def interval_in_words(figures: MedianInterval) -> str:
    """How the interval was found, or why there is none."""
    if figures.reason is not None:
        return f"{NO_INTERVAL}{figures.reason}"
    return (
        f"{figures.confidence:.0%} interval of the median: block bootstrap of {figures.count} "
        f"samples in blocks of {figures.block_length}"
    )


def steady_of(
    step_s: Sequence[float], *, segment_starts: Sequence[int], excluded_steps: Collection[int]
) -> SteadyState:
    """Where the last launch is steady; steps are counted from its first.

    Args:
        step_s: seconds of every optimizer step of every launch.
        launches: first step of each launch.
        excluded_steps: steps of the run that are known not to be steady.
    """
    first = segment_starts[-1]
    last = [step - first for step in excluded_steps if first <= step < len(step_s)]
    return find_steady_state(step_s[first:], last)


def recorded_steady(record: Mapping[str, Any]) -> SteadyState:
    """The steady state as a record tells it; steps are counted from the last launch's first."""
    if record["steady_from"] is None:
        return SteadyState(start=None, reason=record["no_steady_state_reason"])
    first = record["segment_starts"][-1]
    start = record["steady_from"] - first
    left_out = (item["step"] - first for item in record["excluded_steps"])
    return SteadyState(start=start, left_out=tuple(step for step in left_out if step > start))


def read_out(
    step_s: Sequence[float],
    samples: Mapping[str, Sequence[float | None]],
    steady: SteadyState,
    *,
    segment_starts: Sequence[int],
    units_per_step: float,
) -> StepMetrics | None:
    """Figures of the steady steps; None where there are none.

    Args:
        step_s: as for `steady_of`.
        samples: the other samples of the same steps, by name; some records lack the optional ones.
        units_per_step: tokens or pictures of an optimizer step over all ranks.
    """
    own_s = step_s[segment_starts[-1] :]
    kept = steady.steps(len(own_s))
    if not kept:
        return None
    last = {name: series[segment_starts[-1] :] for name, series in samples.items()}
    kept_s = [own_s[step] for step in kept]
    total_s = math.fsum(kept_s)
    told = {name: _all_told(last.get(name), kept) for name in ("cpu_s", *PARTS, *COMMUNICATION)}
    shares = {name: math.fsum(own_s) / total_s for name, own_s in told.items() if own_s is not None}
    waiting_share = None
    if shares.keys() >= {*COMMUNICATION}:
        waiting_share = shares["communication_s"] - shares["min_communication_s"]
    # What lies between a steady step and another one that is none is of that one's making.
    is_kept = set(kept)
    behind = [step for step in kept if step - 1 in is_kept]
    gaps_s = _all_told(last.get("between_steps_s"), behind)
    between_s = math.fsum(gaps_s or [])
    step = describe(kept_s)
    return StepMetrics(
        step=step,
        interval=interval_in_words(step),
        median_cpu_s=statistics.median(told["cpu_s"] or ()),
        units_per_s=units_per_step / step.median,
        low_units_per_s=None if step.high is None else units_per_step / step.high,
        high_units_per_s=None if step.low is None else units_per_step / step.low,
        mean_units_per_s=mean_rate(kept_s, units_per_step, between_steps_s=between_s),
        shares={part: shares[part] for part in ALL_PARTS if part in shares},
        waiting_share=waiting_share,
        between_steps_share=None if gaps_s is None else between_s / (total_s + between_s),
    )


def _all_told(samples: Sequence[float | None] | None, steps: Sequence[int]) -> list[float] | None:
    """Of these steps; None if one of them is not told."""
    if samples is None:
        return None
    told = [sample for step in steps if (sample := samples[step]) is not None]
    return told if len(told) == len(steps) else None


def launches_in_words(variance: LaunchVariance) -> str:
    """Variance within and between launches, and the interval over them."""
    medians = ", ".join(f"{median * 1000:.2f}" for median in variance.medians)
    told = f"median steps {medians} ms"
    if variance.median is None or variance.within is None or variance.between is None:
        return f"{told}; not split: {variance.reason}"
    assert variance.low is not None
    assert variance.high is not None
    return (
        f"{told}; all together {variance.median * 1000:.2f} ms "
        f"({variance.low * 1000:.2f} to {variance.high * 1000:.2f}); a launch's median varies by "
        f"{variance.within:.2%} because its steps differ, and by {variance.between:.2%} from "
        "launch to launch beyond that"
    )


def passport_of(
    config: RunConfig,
    units_per_s: float | None,
    hardware: Sequence[Mapping[str, Any]],
    ceilings: Sequence[Mapping[str, Any] | None],
) -> tuple[MfuRow, ...]:
    """The MFU passport of a run.

    Args:
        units_per_s: of all ranks together; None without a steady state.
        hardware: of every rank, as records tell it.
        ceilings: what every rank measured in this job; None where it did not. The highest counts.
    """
    measured = [
        Ceiling(flops_per_s=ceiling["matmul_flops_per_s"], dtype=ceiling["dtype"])
        for ceiling in ceilings
        if ceiling is not None
    ]
    matmul = hardware[0].get("float32_matmul_precision")
    return build_mfu_report(
        count_flops(config),
        units_per_s=units_per_s,
        num_devices=config.parallel.world_size,
        device_name=name_of_all([str(host["device"]) for host in hardware]),
        precision=config.parallel.precision,
        allows_tf32=None if matmul is None else matmul != "highest",
        ceiling=max(measured, key=lambda ceiling: ceiling.flops_per_s, default=None),
    )


def name_of_all(devices: Sequence[str]) -> str:
    """The name that all devices share; a mix of several has no peak."""
    return " and ".join(dict.fromkeys(devices))
