"""Two runs of a curve in; where the step lost time against the ideal one out."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scaling.analysis.efficiency import steady_metrics
from scaling.store.run import Run
from unitransformer.record.metrics import recorded_steady

LossPart = Literal[
    "input",
    "exposed communication",
    "waiting for the slowest rank",
    "optimizer",
    "forward and backward",
]
ToldBy = Literal["clock", "trace", "nothing"]
Shares = Mapping[LossPart, float]  # of a step


UNTOLD = (
    "forward and backward holds smaller kernels, the host and communication together; `--trace` on "
    "both runs tells communication apart"
)
FROM_THE_CLOCK = (
    "communication is that of the rank which stood still least at each step; what others stood "
    "still beyond it is waiting for that rank"
)
FROM_A_TRACE = (
    "communication is the share that one rank's trace tells, and it is taken out of forward and "
    "backward; idle is within the other parts"
)
OF_DEEPSPEED = "some of the communication may be the optimizer's, which the trace does not tell"
WAITING = (
    "what waiting for the slowest rank cost is not told: the record holds the slowest rank's times "
    "alone"
)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What the trace that tells communication says of itself."""

    slowdown: float  # a traced step over a steady one
    idle: float  # share of the traced steps
    baseline_idle: float | None  # None: the baseline was not traced


@dataclass(frozen=True, kw_only=True)
class Slowest:
    """The rank that was the slowest most often."""

    rank: int
    share: float  # of the steady steps
    chance: float  # that share if all ranks were alike


@dataclass(frozen=True, kw_only=True)
class TimeLost:
    """What one run lost against another, as shares of its step; a negative part was gained.

    The parts add up to `share`. Communication that cannot be told apart is in forward and backward,
    and neither `exposed communication` nor waiting is among the parts.
    """

    share: float  # 1 - efficiency of these two runs
    parts: Mapping[LossPart, float]
    caveats: tuple[str, ...]  # what the records cannot tell, the same for all runs of a kind
    traced: Traced | None  # None: communication is not told by a trace
    slowest: Slowest | None  # None: there is one rank


def explain(baseline: Run, run: Run) -> TimeLost:
    """Which parts of a step take longer than those of the baseline, divided over the devices.

    The ideal step takes T_0 (p_0 / p_n) (units_n / units_0) seconds: as long as the baseline's on a
    weak curve, p_0 / p_n of it on a strong one. Each part of the step is held to the same.

    Raises:
        ValueError: a run without a steady state, runs of different recipes.
    """
    if run.config.recipe != baseline.config.recipe:
        raise ValueError(
            f"run is of recipe {run.config.recipe} and baseline of {baseline.config.recipe}; "
            "compare runs of one recipe"
        )
    told_by, *told = _communication(baseline, run)
    before, after = (_parts_s(each, s) for each, s in zip((baseline, run), told, strict=True))
    devices = baseline.config.parallel.world_size / run.config.parallel.world_size
    ideal = devices * run.units_per_step / baseline.units_per_step
    step_s = math.fsum(after.values())
    parts = {part: (after[part] - ideal * before[part]) / step_s for part in after}
    return TimeLost(
        share=1 - ideal * math.fsum(before.values()) / step_s,
        parts=parts,
        caveats=tuple(_caveats(run, told_by)),
        traced=_traced(baseline, run) if told_by == "trace" else None,
        slowest=_slowest(run),
    )


def _parts_s(run: Run, communication: Shares) -> dict[LossPart, float]:
    """Seconds of the median steady step, divided as all steady steps together are."""
    readout = steady_metrics(run)
    step_s, shares = readout.step.median, readout.shares
    parts: dict[LossPart, float] = {"input": shares["data_s"] * step_s}
    parts |= {part: share * step_s for part, share in communication.items()}
    parts["optimizer"] = shares["optimizer_s"] * step_s
    parts["forward and backward"] = step_s - math.fsum(parts.values())
    return parts


def _trace(run: Run) -> Mapping[str, Any] | None:
    """Of the first rank that was traced as a whole."""
    traces = run.record.get("trace") or []
    return next((trace for trace in traces if trace and trace["rows"]), None)


def _communication(baseline: Run, run: Run) -> tuple[ToldBy, Shares, Shares]:
    """What tells the communication of both runs, and their shares: empty where nothing does."""
    clocked = [_by_the_clock(each) for each in (baseline, run)]
    if all(clocked):
        return "clock", clocked[0], clocked[1]
    traced = [_by_a_trace(each) for each in (baseline, run)]
    if all(traced):
        return "trace", traced[0], traced[1]
    return "nothing", {}, {}


def _by_the_clock(run: Run) -> Shares:
    """Of all steady steps; empty where the record does not tell."""
    if run.config.parallel.world_size == 1:
        return {"exposed communication": 0.0, "waiting for the slowest rank": 0.0}
    readout = steady_metrics(run)
    if readout.waiting_share is None:
        return {}
    waiting = readout.waiting_share
    return {
        "exposed communication": readout.shares["communication_s"] - waiting,
        "waiting for the slowest rank": waiting,
    }


def _by_a_trace(run: Run) -> Shares:
    """Share of a traced step in which nothing but communication ran; empty where not told."""
    if run.config.parallel.world_size == 1:
        return {"exposed communication": 0.0}
    trace = _trace(run)
    return {} if trace is None else {"exposed communication": _share_of(trace, "communication")}


def _share_of(trace: Mapping[str, Any], part: str) -> float:
    return math.fsum(row["share"] for row in trace["rows"] if row["part"] == part)


def _caveats(run: Run, told_by: ToldBy) -> Iterable[str]:
    if run.config.parallel.world_size > 1 and told_by == "clock":
        yield FROM_THE_CLOCK
        return
    if told_by == "nothing":
        yield UNTOLD
    elif _trace(run) is not None:
        yield FROM_A_TRACE
        if run.config.parallel.uses_deepspeed:
            yield OF_DEEPSPEED
    if run.config.parallel.world_size > 1:
        yield WAITING


def _traced(baseline: Run, run: Run) -> Traced | None:
    """Waiting is within input or forward and backward, so it is no part of its own."""
    trace, before = _trace(run), _trace(baseline)
    if trace is None:
        return None
    return Traced(
        slowdown=trace["step_s"] / steady_metrics(run).step.median,
        idle=_share_of(trace, "idle"),
        baseline_idle=None if before is None else _share_of(before, "idle"),
    )


def _slowest(run: Run) -> Slowest | None:
    """By how much it was slower is not in the record."""
    world_size = run.config.parallel.world_size
    if world_size == 1:
        return None
    first = run.record["segment_starts"][-1]
    ranks = recorded_steady(run.record).select(run.record["samples"]["slowest_rank"][first:])
    worst = max(sorted(set(ranks)), key=ranks.count)
    return Slowest(rank=int(worst), share=ranks.count(worst) / len(ranks), chance=1 / world_size)
